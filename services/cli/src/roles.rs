//! The processes: bind, load, register, serve, leave.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{sync::oneshot, task::JoinSet};
use uniarm_base::{GrpcScorer, StoreScorer, server::BaseService};
use uniarm_cluster::{MemberStore, MemoryStore, Registration, RegistrationState, StoreAddress};
use uniarm_engine::fused::fuse;
use uniarm_proto::{FILE_DESCRIPTOR_SET, Generation, Member, MemberId, Role};
use uniarm_router::{RouterOptions, RouterService, peers};
use uniarm_runtime::{
    Admin, AdminOptions, LogFormat, Metrics, Readiness, Shutdown, TelemetryGuard, TelemetryOptions,
    grpc::{GrpcOptions, GrpcServer},
    http::HttpServer,
    telemetry,
};

use crate::{
    args::{BaseArgs, EngineArgs, LogArgs, LogForm, ProcessArgs, RewardArgs, RouterArgs, UpArgs},
    demo_adapter::{self, DemoAdapter},
    group,
    local::LocalScorer,
    served::{HAND_OVER, Served, drain},
    worker::{self, Loaded},
};

/// A restarted process finds the record of its former life until that one's lease ends.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// What every role starts with.
pub struct Process {
    pub role: Role,
    id: MemberId,
    pub advertise: String,
    pub store: Arc<dyn MemberStore>,
    pub server: GrpcServer,
    /// The HTTP front door, of a router that has one.
    http: Option<HttpServer>,
    options: GrpcOptions,
    pub readiness: Readiness,
    pub metrics: Metrics,
    pub shutdown: Shutdown,
    /// Says that this process is no use any more, and why.
    pub lost: Option<oneshot::Receiver<String>>,
    _admin: Option<Admin>,
    _telemetry: TelemetryGuard,
}

// === roles ===

pub async fn router(args: RouterArgs) -> anyhow::Result<()> {
    let address = args.process.store.parse()?;
    let has_peers = !args.base_peer.is_empty() || !args.reward_peer.is_empty();
    match (&address, has_peers) {
        (StoreAddress::Memory, false) => {
            bail!("a router with --store memory needs --base-peer (and --reward-peer), or give it etcd://…")
        }
        (StoreAddress::Etcd { .. }, true) => bail!("--base-peer and --reward-peer go with --store memory"),
        _ => {}
    }
    let Some(mut process) = Process::start(Role::Router, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    let http = match &args.http_listen {
        Some(address) => Some(HttpServer::bind(address, process.options.drain).await?),
        None if args.front.batch_dir.is_some() => bail!("--batch-dir goes with --http-listen"),
        None => None,
    };
    for peer in args.base_peer.iter().chain(&args.reward_peer) {
        tokio::spawn(peers::follow(peer.clone(), Arc::clone(&process.store), process.shutdown.clone()));
    }
    let options = RouterOptions { requests_max: args.requests_max, ..RouterOptions::default() };
    let service = RouterService::new(process.store.watch(), options, &process.metrics);
    let host = args.front.open_host(&service, args.requests_max)?;
    process.http = http.map(|http| http.with_routes(service.http_routes(args.front.routes(host))));
    let Some(member) = process.member(Member::new(Role::Router)).await? else { return Ok(()) };
    process.serve(member, Served::Router(service), None).await
}

pub async fn base(args: BaseArgs) -> anyhow::Result<()> {
    args.models.check()?;
    if args.fused_reward.is_none() && args.models.is_some() {
        bail!(
            "--adapter, --reward-system and --prompted go with --fused-reward: a base worker alone steers nothing"
        );
    }
    let seat = args.group.seat(&args.process)?;
    if args.fused_reward.is_some() && seat.is_some() {
        bail!("--fused-reward does not go with --group: a group of processes has one role");
    }
    let Some(process) = Process::start(Role::Base, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    if let Some(seat) = seat {
        return group::base(process, seat, args).await;
    }
    let threads = worker::Threads::of(args.fused_reward.is_some());
    let Some(loaded) = process.load(args.model.clone(), &args.engine, threads).await? else { return Ok(()) };
    match args.fused_reward.clone() {
        None => base_alone(process, loaded, args).await,
        Some(address) => base_fused(process, loaded, args, &address).await,
    }
}

async fn base_alone(process: Process, loaded: Loaded, args: BaseArgs) -> anyhow::Result<()> {
    let flags = (&args.engine, &args.exchange);
    let model = Box::new(loaded.llama);
    let scorer = Arc::new(StoreScorer::new(GrpcScorer::default(), process.store.watch()));
    let (handle, member) =
        worker::start_base(loaded.files, model, args.name, flags, scorer, &process.metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    process.serve(member, Served::Base(handle), None).await
}

/// Both roles over one copy of the weights. Other base workers may use the reward role too: it has an address of its own.
async fn base_fused(process: Process, loaded: Loaded, args: BaseArgs, address: &str) -> anyhow::Result<()> {
    let Process { metrics, readiness, options, .. } = &process;
    let server = GrpcServer::bind(address, options.clone(), readiness.clone()).await?;
    let reward_files = worker::open(&args.model)?;
    let [base_model, reward_model] = fuse(Box::new(loaded.llama));
    let (reward, member) =
        worker::start_reward(reward_files, Box::new(reward_model), &args.models, &args.engine, metrics)?;
    let id = MemberId(format!("{}-reward", process.id));
    let advertise = match &args.process.advertise {
        Some(advertise) => {
            let host = advertise.rsplit_once(':').map_or(advertise.as_str(), |(host, _)| host);
            format!("{host}:{}", server.local_addr().port())
        }
        None => advertised(&server),
    };
    let Some(reward_member) = process.member(Member { id, address: advertise, ..member }).await? else {
        return Ok(());
    };
    let flags = (&args.engine, &args.exchange);
    let others = StoreScorer::new(GrpcScorer::default(), process.store.watch());
    let scorer = Arc::new(LocalScorer::beside(reward.clone(), reward_member.id.clone(), others));
    let (handle, member) =
        worker::start_base(loaded.files, Box::new(base_model), args.name, flags, scorer, metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    let beside = Some((reward_member, server, Served::Reward(reward)));
    process.serve(member, Served::Base(handle), beside).await
}

pub async fn reward(args: RewardArgs) -> anyhow::Result<()> {
    args.models.check()?;
    let seat = args.group.seat(&args.process)?;
    let Some(process) = Process::start(Role::Reward, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    if let Some(seat) = seat {
        return group::reward(process, seat, args).await;
    }
    let threads = worker::Threads::of(false);
    let Some(loaded) = process.load(args.model, &args.engine, threads).await? else { return Ok(()) };
    let model = Box::new(loaded.llama);
    let (handle, member) =
        worker::start_reward(loaded.files, model, &args.models, &args.engine, &process.metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    process.serve(member, Served::Reward(handle), None).await
}

/// Router, base and reward in one process: the router dials the base worker on the loopback interface, base and reward
/// share memory.
pub async fn up(args: UpArgs) -> anyhow::Result<()> {
    let _telemetry = init_telemetry("uniarm", &args.log)?;
    let shutdown = Shutdown::on_signals()?;
    let metrics = Metrics::new();
    let store = MemoryStore::new();
    let readiness = Readiness::starting();
    let front = GrpcServer::bind(&args.grpc, GrpcOptions::default(), readiness.clone()).await?;
    let http = match args.http_listen.as_str() {
        "none" if args.front.batch_dir.is_some() => bail!("--batch-dir wants an HTTP front door"),
        "none" => None,
        address => {
            Some(HttpServer::bind(address, GrpcOptions::default().drain).await.context("--http-listen")?)
        }
    };
    let back = GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), readiness.clone()).await?;
    let _admin = start_admin(args.admin.as_deref(), &metrics, "up", &readiness)?;

    let mut models = args.models.clone();
    // The adapter that ships fits the demo model alone.
    let shipped = (args.base.is_none() && !models.is_some()).then(DemoAdapter::unpack).transpose()?;
    if let Some(shipped) = &shipped {
        models.adapter.push(shipped.flag());
        let others =
            worker::DEMO_PROMPTED.iter().filter(|(name, _)| !demo_adapter::OBJECTIVES.contains(name));
        models.prompted.extend(others.map(|(name, text)| format!("{name}={text}")));
    }
    let base_source = match &args.base {
        Some(source) => source.clone(),
        None => worker::demo_model().await?,
    };
    let reward_source = args.reward.clone().unwrap_or_else(|| base_source.clone());
    if args.fused && reward_source != base_source {
        bail!("--fused wants one model for both roles, and --reward names another than --base");
    }
    let loaded = worker::load(base_source.clone(), &args.engine, worker::Threads::of(args.fused)).await?;
    let pair = worker::pair(loaded, (&base_source, reward_source), &args.engine, args.fused).await?;
    let (reward, reward_member) =
        worker::start_reward(pair.reward_files, pair.reward, &models, &args.engine, &metrics)?;
    let scorer = Arc::new(LocalScorer::new(reward));
    let flags = (&args.engine, &args.exchange);
    let (base, base_member) = worker::start_base(pair.base_files, pair.base, None, flags, scorer, &metrics)?;

    let reward_member = Member { id: MemberId("reward".into()), ..reward_member };
    let base_address = back.local_addr().to_string();
    let base_member = Member { id: MemberId("base".into()), address: base_address, ..base_member };
    let reward_registration = enter(&store, reward_member.clone()).await?.1;
    let (base_member, base_registration) = enter(&store, base_member).await?;

    let ready = ready_line(front.local_addr(), &base_member, &reward_member);
    let options = RouterOptions::default();
    let service = RouterService::new(store.watch(), options.clone(), &metrics);
    let host = args.front.open_host(&service, options.requests_max)?;
    let front = front.add_service(service.inference_server()).add_service(service.status_server());
    let front = front.add_descriptors(FILE_DESCRIPTOR_SET);
    let base_service = BaseService::new(base, base_member);
    let back = back.add_service(base_service.base_server()).add_descriptors(FILE_DESCRIPTOR_SET);
    readiness.set_ready();
    println!("{ready}");
    let door = async {
        let Some(http) = http else { return Ok(()) };
        println!("{}", door_line(http.local_addr()));
        http.with_routes(service.http_routes(args.front.routes(host))).serve(shutdown.clone()).await;
        Ok(())
    };
    tokio::try_join!(front.serve(shutdown.clone()), back.serve(shutdown.clone()), door)?;
    base_registration.leave().await;
    reward_registration.leave().await;
    store.close().await;
    Ok(())
}

fn ready_line(front: std::net::SocketAddr, base: &Member, reward: &Member) -> String {
    let model = base.base_model.as_ref().map_or("", |model| &model.name);
    let rewards: Vec<String> = reward
        .reward_models
        .iter()
        .map(|served| {
            let objectives: Vec<&str> = served.objectives.iter().map(|o| o.name.as_str()).collect();
            format!("{} ({})", served.name, objectives.join(", "))
        })
        .collect();
    format!("uniarm is ready at http://{front}: base {model}, rewards {}", rewards.join(", "))
}

fn door_line(address: std::net::SocketAddr) -> String {
    format!("the playground is at http://{address}/, OpenAI's API at http://{address}/v1")
}

// === impl Process ===

impl Process {
    /// Binds and opens what comes before the model. `None`: `--check` was given and all is well.
    async fn start(role: Role, args: &ProcessArgs, shown: &str) -> anyhow::Result<Option<Self>> {
        args.store.parse()?;
        if !(args.drain_timeout.is_finite() && args.drain_timeout >= 0.0) {
            bail!("--drain-timeout wants seconds, not {}", args.drain_timeout);
        }
        if args.check {
            println!("{shown}");
            return Ok(None);
        }
        let _telemetry = init_telemetry(&format!("uniarm-{role}"), &args.log)?;
        let shutdown = Shutdown::on_signals()?;
        let metrics = Metrics::new();
        let readiness = Readiness::starting();
        let options =
            GrpcOptions { drain: Duration::from_secs_f32(args.drain_timeout), ..GrpcOptions::default() };
        let server = GrpcServer::bind(&args.listen, options.clone(), readiness.clone()).await?;
        let _admin = start_admin(args.admin.as_deref(), &metrics, role.name(), &readiness)?;
        let port = server.local_addr().port();
        let advertise = args.advertise.clone().unwrap_or_else(|| advertised(&server));
        let id = args.id.clone().unwrap_or_else(|| format!("{role}-{}-{port}", hostname()));
        let store = args.store.open()?;
        tracing::info!(%id, listen = %server.local_addr(), advertise, store = args.store.address, "starting");
        let id = MemberId(id);
        Ok(Some(Self {
            role,
            id,
            advertise,
            store,
            server,
            http: None,
            options,
            readiness,
            metrics,
            shutdown,
            lost: None,
            _admin,
            _telemetry,
        }))
    }

    /// `None`: stopped while the model was loading.
    async fn load(
        &self,
        model: String,
        engine: &EngineArgs,
        threads: worker::Threads,
    ) -> anyhow::Result<Option<Loaded>> {
        tokio::select! {
            loaded = worker::load(model, engine, threads) => Ok(Some(loaded?)),
            () = self.shutdown.begun() => Ok(None),
        }
    }

    /// A member of this process in its next generation: under the process's own id and address, unless it has others.
    /// `None`: stopped before the store answered.
    pub async fn member(&self, mut member: Member) -> anyhow::Result<Option<Member>> {
        if member.id.0.is_empty() {
            member.id.clone_from(&self.id);
            member.address.clone_from(&self.advertise);
        }
        tokio::select! {
            generation = self.store.next_generation(&member.id) => {
                Ok(Some(Member { generation: generation?, ..member }))
            }
            () = self.shutdown.begun() => Ok(None),
        }
    }

    /// Serves, registers once the servers answer, and leaves the store before they stop. `beside`: a second role with a
    /// server of its own.
    pub async fn serve(
        self,
        member: Member,
        served: Served,
        beside: Option<(Member, GrpcServer, Served)>,
    ) -> anyhow::Result<()> {
        let Self { store, server, http, readiness, shutdown, options, mut lost, .. } = self;
        let mut why = None;
        // The servers outlive the registrations: while they drain, nobody new is sent here.
        let serving = Shutdown::new();
        let (mut members, mut all, mut servers) = (Vec::new(), Vec::new(), JoinSet::new());
        for (member, server, served) in std::iter::once((member, server, served)).chain(beside) {
            let server = served.add_to(server, member.clone()).add_descriptors(FILE_DESCRIPTOR_SET);
            members.push((member, server.local_addr()));
            all.push(served);
            servers.spawn(server.serve(serving.clone()));
        }
        let door = http.as_ref().map(HttpServer::local_addr);
        if let Some(http) = http {
            let serving = serving.clone();
            servers.spawn(async move {
                http.serve(serving).await;
                Ok(())
            });
        }
        let registered = tokio::select! {
            registered = register(&*store, &members) => Some(registered?),
            () = shutdown.begun() => None,
            said = group::said(&mut lost) => {
                why = Some(said);
                None
            }
            Some(ended) = servers.join_next() => return Ok(ended??),
        };
        if let Some(registrations) = registered {
            readiness.set_ready();
            for (member, local) in &members {
                tracing::info!(id = %member.id, generation = %member.generation, "ready");
                println!("uniarm {} is ready at http://{local}", member.role);
            }
            if let Some(door) = door {
                println!("{}", door_line(door));
            }
            tokio::select! {
                () = shutdown.begun() => {}
                by = superseded(&registrations[0]) => {
                    tracing::error!(%by, "another process has taken this one's id; stopping");
                }
                said = group::said(&mut lost) => {
                    tracing::error!(why = %said, "a rank is lost; streams go on elsewhere");
                    why = Some(said);
                }
                Some(ended) = servers.join_next() => return Ok(ended??),
            }
            readiness.set_not_ready("draining");
            all.iter().for_each(Served::begin_drain);
            if why.is_some() {
                all.iter().for_each(Served::hand_over);
            }
            for registration in registrations {
                registration.leave().await;
            }
        }
        serving.begin();
        // Of a model that is lost, nothing runs that could end by itself.
        let patience = if why.is_some() { HAND_OVER } else { Duration::MAX };
        if let Ok(drained) = tokio::time::timeout(patience, drain(servers, &all, options.drain)).await {
            drained?;
        }
        store.close().await;
        if let Some(why) = why {
            bail!("the group is over: {why}");
        }
        tracing::info!("stopped");
        Ok(())
    }
}

async fn register(
    store: &dyn MemberStore,
    members: &[(Member, std::net::SocketAddr)],
) -> anyhow::Result<Vec<Registration>> {
    let mut registrations = Vec::with_capacity(members.len());
    for (member, _) in members {
        registrations.push(store.register_within(member.clone(), REGISTER_PATIENCE).await?);
    }
    Ok(registrations)
}

/// Returns when another life of this member has taken its place.
async fn superseded(registration: &Registration) -> Generation {
    let mut states = registration.watch();
    loop {
        if let RegistrationState::Superseded { by } = *states.borrow_and_update() {
            return by;
        }
        if states.changed().await.is_err() {
            return std::future::pending().await; // the store is closed: nobody can take the id any more
        }
    }
}

/// Registers a role of a process that has several.
async fn enter(store: &dyn MemberStore, member: Member) -> anyhow::Result<(Member, Registration)> {
    let member = Member { generation: store.next_generation(&member.id).await?, ..member };
    let registration = store.register_within(member.clone(), REGISTER_PATIENCE).await?;
    Ok((member, registration))
}

fn start_admin(
    address: Option<&str>,
    metrics: &Metrics,
    role: &'static str,
    readiness: &Readiness,
) -> anyhow::Result<Option<Admin>> {
    let Some(address) = address else { return Ok(None) };
    let roles = vec![(role, readiness.clone())];
    let admin = Admin::start(AdminOptions { address: address.to_owned(), metrics: metrics.clone(), roles })?;
    tracing::info!(address = %admin.local_addr(), "metrics at /metrics, readiness at /readyz");
    Ok(Some(admin))
}

fn init_telemetry(service: &str, args: &LogArgs) -> anyhow::Result<TelemetryGuard> {
    let options = TelemetryOptions {
        service: service.to_owned(),
        log_format: match args.log {
            LogForm::Text => LogFormat::Text,
            LogForm::Json => LogFormat::Json,
        },
        log_filter: args.log_filter.clone(),
        otlp_endpoint: args.otlp_endpoint.clone(),
        ..TelemetryOptions::default()
    };
    telemetry::init(&options).context("telemetry cannot be set up")
}

/// Where others reach a server whose flags do not say.
fn advertised(server: &GrpcServer) -> String {
    let address = server.local_addr();
    match address.ip().is_unspecified() {
        true => format!("{}:{}", hostname(), address.port()),
        false => address.to_string(),
    }
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}
