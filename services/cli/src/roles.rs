//! The roles: what each of them loads, serves and dials.

use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use uniarm_base::{GrpcScorer, Lanes, StoreScorer, server::BaseService};
use uniarm_cluster::{MemberStore as _, MemoryStore, StoreAddress};
use uniarm_collective::Nccl;
use uniarm_engine::fused::fuse;
use uniarm_proto::{FILE_DESCRIPTOR_SET, Member, MemberId, Role};
use uniarm_reward::AdapterFollower;
use uniarm_router::{RouterOptions, RouterService, peers};
use uniarm_runtime::{
    Metrics, Readiness, Shutdown,
    grpc::{GrpcOptions, GrpcServer},
    http::HttpServer,
};
use uniarm_tls::RoleName;

use crate::{
    args::{BaseArgs, DenseOver, RewardArgs, RouterArgs, UpArgs},
    catalogue,
    demo_adapter::{self, DemoAdapter},
    device::Model,
    group,
    local::LocalScorer,
    output,
    process::{Process, advertised, check_address, door_line, enter, init_telemetry, start_admin},
    served::Served,
    worker,
};

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
    for (flag, named) in [("--base-peer", &args.base_peer), ("--reward-peer", &args.reward_peer)] {
        for peer in named {
            peers::check(peer).map_err(|reason| anyhow!("{flag}: {reason}"))?;
        }
    }
    let tenants = args.front.open_tenants()?;
    args.front.check_folders()?;
    check_address("--http-listen", args.http_listen.as_ref())?;
    if args.front.batch_dir.is_some() && args.http_listen.is_none() {
        bail!("--batch-dir goes with --http-listen");
    }
    let dialer = args.process.tls.dialer(&[RoleName::Base])?;
    let Some(mut process) =
        Process::start(Role::Router, &args.process, args.front.door.grpc()?, &format!("{args:#?}")).await?
    else {
        return Ok(());
    };
    let http = match &args.http_listen {
        Some(address) => {
            let http = HttpServer::bind(address, process.options.drain).await;
            Some(http.context("--http-listen")?.with_tls(args.front.door.http()?))
        }
        None => None,
    };
    for peer in args.base_peer.iter().chain(&args.reward_peer) {
        let dialer = args.process.tls.dialer(&[RoleName::Base, RoleName::Reward])?;
        let following =
            peers::follow(peer.clone(), dialer, Arc::clone(&process.store), process.shutdown.clone());
        tokio::spawn(following);
    }
    tokio::spawn(tenants.clone().follow(process.metrics.clone(), process.shutdown.token()));
    let audit = args.front.open_journal(&process.metrics)?;
    let requests_max = args.requests_max;
    let client_patience = args.front.client_patience();
    let options =
        RouterOptions { requests_max, tenants, audit, dialer, client_patience, ..RouterOptions::default() };
    let service = RouterService::new(process.store.watch(), options, &process.metrics);
    let host = args.front.open_host(&service, args.requests_max, &process.metrics)?;
    process.http = http.map(|http| http.with_routes(service.http_routes(args.front.routes(host))));
    let Some(member) = process.member(Member::new(Role::Router)).await? else { return Ok(()) };
    process.serve(member, Served::Router(service), None).await
}

pub async fn base(args: BaseArgs) -> anyhow::Result<()> {
    args.models.check()?;
    check_address("--fused-reward", args.fused_reward.as_ref())?;
    if args.fused_reward.is_none() && args.models.is_some() {
        bail!(
            "--adapter, --reward-system and --prompted go with --fused-reward: a base worker alone steers nothing"
        );
    }
    check_dense_over(&args)?;
    let timeout = args.group.timeout()?;
    let seat = args.group.seat(Role::Base, &args.process, args.device)?;
    if args.fused_reward.is_some() && seat.is_some() {
        bail!("--fused-reward does not go with --group: a group of processes has one role");
    }
    let Some(process) = Process::start(
        Role::Base,
        &args.process,
        args.process.tls.server(Role::Base)?,
        &format!("{args:#?}"),
    )
    .await?
    else {
        return Ok(());
    };
    args.models.check_folders()?;
    if let Some(seat) = seat {
        return group::base(process, seat, args).await;
    }
    let threads = (&args.engine, worker::Threads::of(args.fused_reward.is_some()));
    let device = (args.device, timeout);
    let Some(loaded) = process.load(args.model.clone(), device, threads).await? else { return Ok(()) };
    match args.fused_reward.clone() {
        None => base_alone(process, loaded, args).await,
        Some(address) => base_fused(process, loaded, args, &address).await,
    }
}

/// Whether whole rows can come as they are asked for.
fn check_dense_over(args: &BaseArgs) -> anyhow::Result<()> {
    if args.dense_over == DenseOver::Grpc {
        return Ok(());
    }
    if args.device.device.is_cpu() {
        bail!("--dense-over nccl goes with --device cuda: rows come to a GPU, and this base worker has none");
    }
    if args.group.group.is_some() || args.fused_reward.is_some() {
        bail!(
            "--dense-over nccl goes with neither --group nor --fused-reward: rows come to the GPU of one process and role"
        );
    }
    Ok(())
}

async fn base_alone(process: Process, loaded: Model, args: BaseArgs) -> anyhow::Result<()> {
    let flags = (&args.engine, &args.exchange);
    let lanes = match args.dense_over {
        DenseOver::Grpc => None,
        DenseOver::Nccl => {
            Nccl::version().context("--dense-over nccl")?;
            loaded.lanes.map(|lanes| Lanes::new(lanes, &process.metrics))
        }
    };
    let grpc = GrpcScorer { dialer: args.process.tls.dialer(&[RoleName::Reward])?, lanes };
    let scorer = Arc::new(StoreScorer::new(grpc, process.store.watch()));
    let (handle, member) =
        worker::start_base(loaded.files, loaded.forward, args.name, flags, scorer, &process.metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    process.serve(member, Served::Base(handle), None).await
}

/// Both roles over one copy of the weights. Other base workers may use the reward role too: it has an address of its own.
async fn base_fused(process: Process, loaded: Model, args: BaseArgs, address: &str) -> anyhow::Result<()> {
    let Process { metrics, readiness, options, .. } = &process;
    let options = GrpcOptions { tls: args.process.tls.server(Role::Reward)?, ..options.clone() };
    let server = GrpcServer::bind(address, options, readiness.clone()).await.context("--fused-reward")?;
    let reward_files = worker::open(&args.model)?;
    let config = reward_files.config.clone();
    let [base_model, reward_model] = fuse(loaded.forward);
    let reward_model = Model::without_lanes(reward_files, Box::new(reward_model));
    let (reward, member) = worker::start_reward(reward_model, &args.models, &args.engine, metrics)?;
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
    let follower = AdapterFollower::new(reward.clone(), config, metrics);
    let Some(reward_member) = catalogue::follow(&process, follower, &reward, reward_member).await else {
        return Ok(());
    };
    let flags = (&args.engine, &args.exchange);
    let grpc = GrpcScorer { dialer: args.process.tls.dialer(&[RoleName::Reward])?, lanes: None };
    let others = StoreScorer::new(grpc, process.store.watch());
    let scorer = Arc::new(LocalScorer::beside(reward.clone(), reward_member.id.clone(), others));
    let (handle, member) =
        worker::start_base(loaded.files, Box::new(base_model), args.name, flags, scorer, metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    let beside = Some((reward_member, server, Served::Reward(reward)));
    process.serve(member, Served::Base(handle), beside).await
}

pub async fn reward(args: RewardArgs) -> anyhow::Result<()> {
    args.models.check()?;
    let timeout = args.group.timeout()?;
    let seat = args.group.seat(Role::Reward, &args.process, args.device)?;
    let Some(process) = Process::start(
        Role::Reward,
        &args.process,
        args.process.tls.server(Role::Reward)?,
        &format!("{args:#?}"),
    )
    .await?
    else {
        return Ok(());
    };
    args.models.check_folders()?;
    if let Some(seat) = seat {
        return group::reward(process, seat, args).await;
    }
    let threads = (&args.engine, worker::Threads::of(false));
    let device = (args.device, timeout);
    let Some(loaded) = process.load(args.model, device, threads).await? else { return Ok(()) };
    let config = loaded.files.config.clone();
    let (handle, member) = worker::start_reward(loaded, &args.models, &args.engine, &process.metrics)?;
    let Some(member) = process.member(member).await? else { return Ok(()) };
    let follower = AdapterFollower::new(handle.clone(), config, &process.metrics);
    let Some(member) = catalogue::follow(&process, follower, &handle, member).await else { return Ok(()) };
    process.serve(member, Served::Reward(handle), None).await
}

/// Router, base and reward in one process: the router dials the base worker on the loopback interface, base and reward
/// share memory.
pub async fn up(args: UpArgs) -> anyhow::Result<()> {
    output::work_unread();
    let _telemetry = init_telemetry("uniarm", &args.log)?;
    let tenants = args.front.open_tenants()?;
    args.front.check_folders()?;
    args.models.check_folders()?;
    let shutdown = Shutdown::on_signals()?;
    let metrics = Metrics::new();
    tokio::spawn(tenants.clone().follow(metrics.clone(), shutdown.token()));
    let store = MemoryStore::new();
    let readiness = Readiness::starting();
    let door = GrpcOptions { tls: args.front.door.grpc()?, ..GrpcOptions::default() };
    let front = GrpcServer::bind(&args.grpc, door, readiness.clone()).await.context("--grpc")?;
    let http = match args.http_listen.as_str() {
        "none" if args.front.batch_dir.is_some() => bail!("--batch-dir wants an HTTP front door"),
        "none" => None,
        address => {
            let http = HttpServer::bind(address, GrpcOptions::default().drain).await;
            Some(http.context("--http-listen")?.with_tls(args.front.door.http()?))
        }
    };
    let back = GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), readiness.clone()).await?;
    let _admin = start_admin(&args.admin, &metrics, "up", &readiness)?;

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
    let reward = Model::without_lanes(pair.reward_files, pair.reward);
    let (reward, reward_member) = worker::start_reward(reward, &models, &args.engine, &metrics)?;
    let scorer = Arc::new(LocalScorer::new(reward));
    let flags = (&args.engine, &args.exchange);
    let (base, base_member) = worker::start_base(pair.base_files, pair.base, None, flags, scorer, &metrics)?;

    let reward_member = Member { id: MemberId("reward".into()), ..reward_member };
    let base_address = back.local_addr().to_string();
    let base_member = Member { id: MemberId("base".into()), address: base_address, ..base_member };
    let reward_registration = enter(&store, reward_member.clone()).await?.1;
    let (base_member, base_registration) = enter(&store, base_member).await?;

    let ready = ready_line(&front.url(), &base_member, &reward_member);
    let audit = args.front.open_journal(&metrics)?;
    let client_patience = args.front.client_patience();
    let options = RouterOptions { tenants, audit, client_patience, ..RouterOptions::default() };
    let service = RouterService::new(store.watch(), options.clone(), &metrics);
    let host = args.front.open_host(&service, options.requests_max, &metrics)?;
    let front = front.add_service(service.inference_server()).add_service(service.status_server());
    let front = front.add_descriptors(FILE_DESCRIPTOR_SET);
    let base_service = BaseService::new(base, base_member);
    let back = back.add_service(base_service.base_server()).add_descriptors(FILE_DESCRIPTOR_SET);
    readiness.set_ready();
    println!("{ready}");
    let door = async {
        let Some(http) = http else { return Ok(()) };
        println!("{}", door_line(&http.url()));
        http.with_routes(service.http_routes(args.front.routes(host))).serve(shutdown.clone()).await;
        Ok(())
    };
    tokio::try_join!(front.serve(shutdown.clone()), back.serve(shutdown.clone()), door)?;
    base_registration.leave().await;
    reward_registration.leave().await;
    store.close().await;
    Ok(())
}

fn ready_line(front: &str, base: &Member, reward: &Member) -> String {
    let model = base.base_model.as_ref().map_or("", |model| &model.name);
    let rewards: Vec<String> = reward
        .reward_models
        .iter()
        .map(|served| {
            let objectives: Vec<&str> = served.objectives.iter().map(|o| o.name.as_str()).collect();
            format!("{} ({})", served.name, objectives.join(", "))
        })
        .collect();
    format!("uniarm is ready at {front}: base {model}, rewards {}", rewards.join(", "))
}
