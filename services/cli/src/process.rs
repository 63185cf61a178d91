//! What every role starts with and ends with: bind, load, register, serve, leave.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{sync::oneshot, task::JoinSet};
use uniarm_cluster::{MemberStore, Registration, RegistrationState};
use uniarm_proto::{FILE_DESCRIPTOR_SET, Generation, Member, MemberId, Role};
use uniarm_runtime::{
    Admin, AdminOptions, LogFormat, Metrics, Readiness, Shutdown, TelemetryGuard, TelemetryOptions,
    grpc::{GrpcOptions, GrpcServer},
    http::HttpServer,
    telemetry,
};
use uniarm_tls::ServerTls;

use crate::{
    args::{EngineArgs, LogArgs, LogForm, ProcessArgs},
    catalogue,
    device::{DeviceArgs, Model},
    group, output,
    served::{HAND_OVER, Served, drain},
    tls::AdminArgs,
    worker,
};

/// A restarted process finds the record of its former life until that one's lease ends.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// What every role starts with.
pub struct Process {
    pub role: Role,
    pub id: MemberId,
    pub advertise: String,
    pub store: Arc<dyn MemberStore>,
    pub server: GrpcServer,
    /// The HTTP front door, of a router that has one.
    pub http: Option<HttpServer>,
    pub options: GrpcOptions,
    pub readiness: Readiness,
    pub metrics: Metrics,
    pub shutdown: Shutdown,
    /// Says that this process is no use any more, and why.
    pub lost: Option<oneshot::Receiver<String>>,
    _admin: Option<Admin>,
    _telemetry: TelemetryGuard,
}

// === impl Process ===

impl Process {
    /// Binds and opens what comes before the model. `None`: `--check` was given and all is well.
    pub async fn start(
        role: Role,
        args: &ProcessArgs,
        tls: Option<ServerTls>,
        shown: &str,
    ) -> anyhow::Result<Option<Self>> {
        args.store.check()?;
        args.admin.server()?;
        check_address("--listen", Some(&args.listen))?;
        check_address("--admin", args.admin.admin.as_ref())?;
        let _telemetry = init_telemetry(&format!("uniarm-{role}"), &args.log)?;
        if args.check {
            println!("{shown}");
            return Ok(None);
        }
        output::work_unread();
        let shutdown = Shutdown::on_signals()?;
        let metrics = Metrics::new();
        let readiness = Readiness::starting();
        let drain = Duration::from_secs_f64(args.drain_timeout);
        let options = GrpcOptions { drain, tls, ..GrpcOptions::default() };
        let server = GrpcServer::bind(&args.listen, options.clone(), readiness.clone()).await;
        let server = server.context("--listen")?;
        let _admin = start_admin(&args.admin, &metrics, role.name(), &readiness)?;
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
    pub async fn load(
        &self,
        model: String,
        (device, lane_timeout): (DeviceArgs, Duration),
        threads: (&EngineArgs, worker::Threads),
    ) -> anyhow::Result<Option<Model>> {
        tokio::select! {
            loaded = device.load(model, threads, lane_timeout) => Ok(Some(loaded?)),
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
            members.push((member, server.url()));
            all.push(served);
            servers.spawn(server.serve(serving.clone()));
        }
        let door = http.as_ref().map(HttpServer::url);
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
            for (member, url) in &members {
                tracing::info!(id = %member.id, generation = %member.generation, "ready");
                println!("uniarm {} is ready at {url}", member.role);
            }
            if let Some(door) = door {
                println!("{}", door_line(&door));
            }
            tokio::select! {
                () = shutdown.begun() => {}
                never = catalogue::announce(&registrations, &members, &all) => match never {},
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
    members: &[(Member, String)],
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
pub async fn enter(store: &dyn MemberStore, member: Member) -> anyhow::Result<(Member, Registration)> {
    let member = Member { generation: store.next_generation(&member.id).await?, ..member };
    let registration = store.register_within(member.clone(), REGISTER_PATIENCE).await?;
    Ok((member, registration))
}

pub fn start_admin(
    args: &AdminArgs,
    metrics: &Metrics,
    role: &'static str,
    readiness: &Readiness,
) -> anyhow::Result<Option<Admin>> {
    let tls = args.server()?;
    let Some(address) = args.admin.clone() else { return Ok(None) };
    metrics.watch_process(&tokio::runtime::Handle::current());
    let roles = vec![(role, readiness.clone())];
    let admin = Admin::start(AdminOptions { address, metrics: metrics.clone(), roles, tls });
    let admin = admin.context("--admin")?;
    tracing::info!(address = %admin.local_addr(), "metrics at /metrics, readiness at /readyz, steps at /debug/steps");
    Ok(Some(admin))
}

pub fn init_telemetry(service: &str, args: &LogArgs) -> anyhow::Result<TelemetryGuard> {
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

/// Refuses what is no address to listen on; whether it is one of this machine, only binding can tell.
///
/// # Errors
/// Names the flag.
pub fn check_address(flag: &str, address: Option<&String>) -> anyhow::Result<()> {
    let Some(address) = address else { return Ok(()) };
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(()),
        _ => bail!("{flag} wants host:port, not {address:?}"),
    }
}

/// Where others reach a server whose flags do not say.
pub fn advertised(server: &GrpcServer) -> String {
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

pub fn door_line(url: &str) -> String {
    format!("the playground is at {url}/, OpenAI's API at {url}/v1")
}
