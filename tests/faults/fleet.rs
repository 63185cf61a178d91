//! A whole cluster of real processes around a real etcd of three nodes, any of which can be hurt.

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use uniarm_proto::ClusterClient;

use crate::{
    harness::{Host, PROMPTED, Running, borrowed, demo_model},
    trio::{EtcdTrio, NODES},
};

pub const ROUTERS: usize = 2;
pub const BASES: usize = 2;
pub const REWARDS: usize = 3;
pub const MEMBERS: usize = ROUTERS + BASES + REWARDS;

/// Long enough for short answers to end by themselves, short enough that long ones are handed over.
const DRAIN_SECONDS: &str = "2";

/// The shortest that etcd grants: a process that was killed takes its id again after it.
const LEASE_SECONDS: &str = "2";

/// A client asks for a sign of life after 1 s, and waits 3 s for it: who is silent is known to be lost then.
const NOTICED_AFTER: Duration = Duration::from_secs(4);

/// 2 routers, 2 base workers (one drafts, one decides for itself), 3 reward workers, and 3 nodes of etcd.
pub struct Fleet {
    /// Routers, then base workers, then reward workers. Locked while something is done to one.
    pub members: Vec<Mutex<Running>>,
    /// Of the routers, for gRPC.
    pub endpoints: Vec<String>,
    /// The same for HTTP.
    pub doors: Vec<String>,
    /// Ends after the members: they would all complain.
    pub etcd: Mutex<EtcdTrio>,
}

/// Where each process runs.
pub struct Places {
    pub members: [Host; MEMBERS],
    pub etcd: [Host; NODES],
}

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, and a new process.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Hang(Duration),
    /// SIGTERM, its own end, and a new process.
    Leave,
}

// === impl Places ===

impl Places {
    /// All of them on this machine.
    pub fn here() -> Self {
        let here = |_| Host::this();
        Self { members: [(); MEMBERS].map(here), etcd: [(); NODES].map(here) }
    }
}

// === impl Fleet ===

impl Fleet {
    pub fn start() -> Self {
        Self::start_at(&Places::here(), &[])
    }

    /// `engine`: flags of every worker.
    pub fn start_at(places: &Places, engine: &[&str]) -> Self {
        let etcd = EtcdTrio::start(places.etcd.clone());
        let store = etcd.address();
        let free = || places.members[..ROUTERS].iter().map(Host::free_address).collect::<Vec<_>>();
        let (endpoints, doors) = (free(), free());
        let start = |member: usize, extra: Vec<String>| {
            let (role, host) = (role_of(member), &places.members[member]);
            let id = format!("{role}-{member}");
            let common = ["--store", &store, "--id", &id, "--drain-timeout", DRAIN_SECONDS];
            let lease = ["--lease-ttl", LEASE_SECONDS];
            Mutex::new(Running::start_on(host, role, &[&common[..], &lease, &borrowed(&extra)].concat()))
        };
        let flags = |member: usize| -> Vec<String> {
            let listen = format!("{}:0", places.members[member].address);
            let window = ["auto", "4"][member % BASES];
            let model: &[&str] = &["--listen", &listen, "--model", demo_model(), "--threads", "1"];
            let flags = match role_of(member) {
                "router" => vec!["--listen", &endpoints[member], "--http-listen", &doors[member]],
                "base" => [model, &["--draft-window", window], engine].concat(),
                _ => [model, &PROMPTED[..], engine].concat(),
            };
            flags.into_iter().map(str::to_owned).collect()
        };
        let members = thread::scope(|scope| {
            let start = &start;
            let starting: Vec<_> = (0..MEMBERS).map(|member| (member, flags(member))).collect();
            let starting: Vec<_> = starting
                .into_iter()
                .map(|(member, flags)| scope.spawn(move || start(member, flags)))
                .collect();
            starting.into_iter().map(|member| member.join().unwrap()).collect()
        });
        Self { etcd: Mutex::new(etcd), members, endpoints, doors }
    }

    /// A client of all routers, once each of them knows its workers.
    pub async fn client(&self) -> ClusterClient {
        for endpoint in &self.endpoints {
            let router = ClusterClient::new(&[endpoint]).unwrap();
            loop {
                let served = router.list_models().await.unwrap();
                if !served.base_models.is_empty() && !served.reward_models.is_empty() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        ClusterClient::new(&self.endpoints).unwrap()
    }

    /// Does it, says when, and returns when the member is back. One thing at a time is done to a member.
    pub fn hurt(&self, member: usize, fault: Fault, begun: impl FnOnce(Instant)) {
        let mut member = self.members[member].lock().unwrap();
        begun(Instant::now());
        match fault {
            Fault::Kill => {
                member.kill();
                member.restart();
            }
            Fault::Hang(time) => {
                member.signal(libc::SIGSTOP);
                thread::sleep(time);
                member.signal(libc::SIGCONT);
            }
            Fault::Leave => {
                member.terminate();
                member.restart();
            }
        }
    }

    /// Starts another base worker under a name of its own, and returns when it has been ready.
    pub fn start_late(&self, name: &str) -> Running {
        let store = self.etcd.lock().unwrap().address();
        let lease = ["--lease-ttl", LEASE_SECONDS];
        let flags = ["--store", &store, "--model", demo_model(), "--name", name, "--threads", "1"];
        Running::start("base", &[&flags[..], &lease].concat())
    }

    /// Whether the first router knows a base model of that name.
    pub fn serves(&self, model: &str) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let router = &self.endpoints[..1];
        let served =
            runtime.block_on(async { ClusterClient::new(router).unwrap().list_models().await.unwrap() });
        served.base_models.iter().any(|served| served.name == model)
    }

    /// Every process is the one that was started.
    pub fn is_whole(&self) -> bool {
        self.members.iter().all(|member| member.lock().unwrap().is_alive())
    }
}

pub fn role_of(member: usize) -> &'static str {
    match member {
        0..ROUTERS => "router",
        member if member < ROUTERS + BASES => "base",
        _ => "reward",
    }
}

/// What a pause costs at least whose cause ends after `time`: until somebody can know, or nobody has to.
pub fn floor_of_silence(time: Duration) -> Duration {
    time.min(NOTICED_AFTER)
}

// === impl Fault ===

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "killed",
            Self::Hang(_) => "hung",
            Self::Leave => "left",
        }
    }

    /// The shortest pause that it can cost: a connection that breaks tells at once, one that is silent does not.
    pub fn floor(self) -> Duration {
        match self {
            Self::Kill | Self::Leave => Duration::ZERO,
            Self::Hang(time) => floor_of_silence(time),
        }
    }
}
