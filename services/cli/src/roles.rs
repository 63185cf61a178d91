//! The processes: bind, load, register, serve, leave.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use uniarm_base::{GrpcScorer, server::BaseService};
use uniarm_cluster::{EtcdOptions, MemberStore, MemoryStore, Registration, RegistrationState, StoreAddress};
use uniarm_proto::{FILE_DESCRIPTOR_SET, Generation, Member, MemberId, Role};
use uniarm_reward::server::RewardService;
use uniarm_router::{RouterOptions, RouterService, peers};
use uniarm_runtime::{
    Admin, AdminOptions, LogFormat, Metrics, Readiness, Shutdown, TelemetryGuard, TelemetryOptions,
    grpc::{GrpcOptions, GrpcServer},
    telemetry,
};

use crate::{
    args::{BaseArgs, EngineArgs, LogArgs, LogForm, ProcessArgs, RewardArgs, RouterArgs, UpArgs},
    local::LocalScorer,
    worker::{self, Loaded},
};

/// A restarted process finds the record of its former life until that one's lease ends.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// What every role starts with.
struct Process {
    id: MemberId,
    advertise: String,
    store: Arc<dyn MemberStore>,
    server: GrpcServer,
    readiness: Readiness,
    metrics: Metrics,
    shutdown: Shutdown,
    _admin: Option<Admin>,
    _telemetry: TelemetryGuard,
}

// === roles ===

pub async fn router(args: RouterArgs) -> anyhow::Result<()> {
    let address = StoreAddress::parse(&args.process.store)?;
    let has_peers = !args.base_peer.is_empty() || !args.reward_peer.is_empty();
    match (&address, has_peers) {
        (StoreAddress::Memory, false) => {
            bail!("a router with --store memory needs --base-peer (and --reward-peer), or give it etcd://…")
        }
        (StoreAddress::Etcd { .. }, true) => bail!("--base-peer and --reward-peer go with --store memory"),
        _ => {}
    }
    let Some(process) = Process::start(Role::Router, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    for peer in args.base_peer.iter().chain(&args.reward_peer) {
        tokio::spawn(peers::follow(peer.clone(), Arc::clone(&process.store), process.shutdown.clone()));
    }
    let options = RouterOptions { requests_max: args.requests_max };
    let service = RouterService::new(process.store.watch(), options, &process.metrics);
    let Some(generation) = process.generation().await? else { return Ok(()) };
    let member = empty_member(Role::Router);
    process.serve(member, generation, |server, _| server.add_service(service.inference_server())).await
}

pub async fn base(args: BaseArgs) -> anyhow::Result<()> {
    let Some(process) = Process::start(Role::Base, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    let Some(loaded) = process.load(args.model, &args.engine).await? else { return Ok(()) };
    let scorer = Arc::new(GrpcScorer);
    let flags = (&args.engine, &args.exchange);
    let (handle, member) =
        worker::start_base(loaded.files, loaded.llama, args.name, flags, scorer, &process.metrics)?;
    let Some(generation) = process.generation().await? else { return Ok(()) };
    process
        .serve(member, generation, |server, member| {
            let service = BaseService::new(handle, member);
            server.add_service(service.base_server()).add_service(service.membership_server())
        })
        .await
}

pub async fn reward(args: RewardArgs) -> anyhow::Result<()> {
    args.models.check()?;
    let Some(process) = Process::start(Role::Reward, &args.process, &format!("{args:#?}")).await? else {
        return Ok(());
    };
    let Some(loaded) = process.load(args.model, &args.engine).await? else { return Ok(()) };
    let (handle, member) =
        worker::start_reward(loaded.files, loaded.llama, &args.models, &args.engine, &process.metrics)?;
    let Some(generation) = process.generation().await? else { return Ok(()) };
    process
        .serve(member, generation, |server, member| {
            let service = RewardService::new(handle, member);
            server.add_service(service.reward_server()).add_service(service.membership_server())
        })
        .await
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
    let back = GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), readiness.clone()).await?;
    let _admin = start_admin(args.admin.as_deref(), &metrics, "up", &readiness)?;

    let mut models = args.models.clone();
    let base_source = match &args.base {
        Some(source) => source.clone(),
        None => {
            if models.adapter.is_empty() && models.system.is_none() && models.prompted.is_empty() {
                models.prompted =
                    worker::DEMO_PROMPTED.iter().map(|(name, text)| format!("{name}={text}")).collect();
            }
            worker::demo_model().await?
        }
    };
    let loaded = worker::load(base_source.clone(), &args.engine).await?;
    let reward_source = args.reward.clone().unwrap_or_else(|| base_source.clone());
    let (reward_files, reward_llama) = if reward_source == base_source {
        (worker::open(&reward_source)?, worker::share(&loaded, &args.engine)?)
    } else {
        let reward = worker::load(reward_source, &args.engine).await?;
        (reward.files, reward.llama)
    };
    let (reward, reward_member) =
        worker::start_reward(reward_files, reward_llama, &models, &args.engine, &metrics)?;
    let scorer = Arc::new(LocalScorer::new(reward));
    let flags = (&args.engine, &args.exchange);
    let (base, base_member) = worker::start_base(loaded.files, loaded.llama, None, flags, scorer, &metrics)?;

    let reward_member = Member { id: MemberId("reward".into()), ..reward_member };
    let base_address = back.local_addr().to_string();
    let base_member = Member { id: MemberId("base".into()), address: base_address, ..base_member };
    let reward_registration = enter(&store, reward_member.clone()).await?.1;
    let (base_member, base_registration) = enter(&store, base_member).await?;

    let ready = ready_line(front.local_addr(), &base_member, &reward_member);
    let service = RouterService::new(store.watch(), RouterOptions::default(), &metrics);
    let front = front.add_service(service.inference_server()).add_descriptors(FILE_DESCRIPTOR_SET);
    let base_service = BaseService::new(base, base_member);
    let back = back.add_service(base_service.base_server()).add_descriptors(FILE_DESCRIPTOR_SET);
    readiness.set_ready();
    println!("{ready}");
    tokio::try_join!(front.serve(shutdown.clone()), back.serve(shutdown.clone()))?;
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

// === impl Process ===

impl Process {
    /// Binds and opens what comes before the model. `None`: `--check` was given and all is well.
    async fn start(role: Role, args: &ProcessArgs, shown: &str) -> anyhow::Result<Option<Self>> {
        let address = StoreAddress::parse(&args.store)?;
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
        let server = GrpcServer::bind(&args.listen, options, readiness.clone()).await?;
        let _admin = start_admin(args.admin.as_deref(), &metrics, role.name(), &readiness)?;
        let port = server.local_addr().port();
        let advertise = match &args.advertise {
            Some(advertise) => advertise.clone(),
            None if server.local_addr().ip().is_unspecified() => format!("{}:{port}", hostname()),
            None => server.local_addr().to_string(),
        };
        let id = args.id.clone().unwrap_or_else(|| format!("{role}-{}-{port}", hostname()));
        let store = uniarm_cluster::open(&address, EtcdOptions::default())?;
        tracing::info!(%id, listen = %server.local_addr(), advertise, store = args.store, "starting");
        let id = MemberId(id);
        Ok(Some(Self { id, advertise, store, server, readiness, metrics, shutdown, _admin, _telemetry }))
    }

    /// `None`: stopped while the model was loading.
    async fn load(&self, model: String, engine: &EngineArgs) -> anyhow::Result<Option<Loaded>> {
        tokio::select! {
            loaded = worker::load(model, engine) => Ok(Some(loaded?)),
            () = self.shutdown.begun() => Ok(None),
        }
    }

    /// `None`: stopped before the store answered.
    async fn generation(&self) -> anyhow::Result<Option<Generation>> {
        tokio::select! {
            generation = self.store.next_generation(&self.id) => Ok(Some(generation?)),
            () = self.shutdown.begun() => Ok(None),
        }
    }

    /// Serves, registers once the server answers, and leaves the store before the server stops.
    async fn serve(
        self,
        member: Member,
        generation: Generation,
        add: impl FnOnce(GrpcServer, Member) -> GrpcServer,
    ) -> anyhow::Result<()> {
        let Self { id, advertise, store, server, readiness, shutdown, .. } = self;
        let member = Member { id, generation, address: advertise, ..member };
        let server = add(server, member.clone()).add_descriptors(FILE_DESCRIPTOR_SET);
        let local = server.local_addr();
        // The server outlives the registration: while it drains, nobody new is sent here.
        let serving = Shutdown::new();
        let mut server = tokio::spawn(server.serve(serving.clone()));
        let registered = tokio::select! {
            registered = store.register_within(member.clone(), REGISTER_PATIENCE) => Some(registered?),
            () = shutdown.begun() => None,
            ended = &mut server => return Ok(ended??),
        };
        if let Some(registration) = registered {
            readiness.set_ready();
            tracing::info!(id = %member.id, %generation, "ready");
            println!("uniarm {} is ready at http://{local}", member.role);
            tokio::select! {
                () = shutdown.begun() => {}
                by = superseded(&registration) => {
                    tracing::error!(%by, "another process has taken this one's id; stopping");
                }
                ended = &mut server => return Ok(ended??),
            }
            readiness.set_not_ready("draining");
            registration.leave().await;
        }
        serving.begin();
        server.await??;
        store.close().await;
        tracing::info!("stopped");
        Ok(())
    }
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

fn empty_member(role: Role) -> Member {
    Member {
        id: MemberId(String::new()),
        generation: Generation(0),
        role,
        address: String::new(),
        tokenizer: None,
        vocabulary: 0,
        capacity: 0,
        base_model: None,
        reward_models: Vec::new(),
        group: String::new(),
        rank: 0,
        size: 1,
    }
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

fn hostname() -> String {
    let name = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}
