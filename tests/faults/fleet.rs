//! A whole cluster of real processes around a real etcd, any of which can be hurt.

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use uniarm_cluster::testing::EtcdServer;
use uniarm_proto::ClusterClient;

use crate::harness::{PROMPTED, Running, demo_model, free_address};

pub const ROUTERS: usize = 2;
pub const BASES: usize = 2;
pub const REWARDS: usize = 3;

/// Long enough for short answers to end by themselves, short enough that long ones are handed over.
const DRAIN_SECONDS: &str = "2";

/// The shortest that etcd grants: a process that was killed takes its id again after it.
const LEASE_SECONDS: &str = "2";

/// What a base worker that comes late calls its model.
pub const LATE: &str = "late";

/// 2 routers, 2 base workers (one drafts, one decides for itself), 3 reward workers, and etcd.
pub struct Fleet {
    pub etcd: Mutex<EtcdServer>,
    /// Routers, then base workers, then reward workers. Locked while something is done to one.
    pub members: Vec<Mutex<Running>>,
    pub endpoints: Vec<String>,
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

// === impl Fleet ===

impl Fleet {
    pub fn start() -> Self {
        let etcd = EtcdServer::start().expect("a fleet needs etcd");
        let store = etcd.address();
        let endpoints: Vec<String> = (0..ROUTERS).map(|_| free_address()).collect();
        let start = |role: &'static str, number: usize, extra: Vec<String>| {
            let id = format!("{role}-{number}");
            let common = ["--store", &store, "--id", &id, "--drain-timeout", DRAIN_SECONDS];
            let lease = ["--lease-ttl", LEASE_SECONDS];
            let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
            Mutex::new(Running::start(role, &[&common[..], &lease, &extra].concat()))
        };
        let model = || vec!["--model".to_owned(), demo_model().to_owned(), "--threads".into(), "1".into()];
        let members = thread::scope(|scope| {
            let mut starting = Vec::new();
            for (number, endpoint) in endpoints.iter().enumerate() {
                let flags = vec!["--listen".into(), endpoint.clone()];
                starting.push(scope.spawn(move || start("router", number, flags)));
            }
            for number in 0..BASES {
                let drafts = ["--draft-window".to_owned(), ["auto", "4"][number % 2].to_owned()];
                let flags = [model(), drafts.to_vec()].concat();
                starting.push(scope.spawn(move || start("base", number, flags)));
            }
            for number in 0..REWARDS {
                let flags = [model(), PROMPTED.map(str::to_owned).to_vec()].concat();
                starting.push(scope.spawn(move || start("reward", number, flags)));
            }
            starting.into_iter().map(|member| member.join().unwrap()).collect()
        });
        Self { etcd: Mutex::new(etcd), members, endpoints }
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

    /// Starts another base worker, and returns when it has been ready.
    pub fn start_late(&self) -> Running {
        let store = self.etcd.lock().unwrap().address();
        Running::start(
            "base",
            &["--store", &store, "--model", demo_model(), "--name", LATE, "--threads", "1"],
        )
    }

    /// Whether the first router knows a base model of that name.
    pub fn serves(&self, model: &str) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let router = &self.endpoints[..1];
        let served =
            runtime.block_on(async { ClusterClient::new(router).unwrap().list_models().await.unwrap() });
        served.base_models.iter().any(|served| served.name == model)
    }

    pub fn role_of(&self, member: usize) -> &'static str {
        match member {
            0..ROUTERS => "router",
            member if member < ROUTERS + BASES => "base",
            _ => "reward",
        }
    }
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
}
