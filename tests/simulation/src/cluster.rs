//! A whole cluster on one virtual network: routers, base and reward workers as their processes run them, and what a
//! process goes through (start, register, drain, leave, end).

mod held;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use uniarm_base::{
    BaseEngine, BaseHandle, BaseOptions, BaseSettings, DraftRows, DraftWindow, GrpcScorer, PaceOptions,
    StoreScorer, server::BaseService,
};
use uniarm_cluster::{MemberStore, MemoryStore, Registration, Snapshot, SnapshotReceiver};
use uniarm_engine::ExecutorOptions;
use uniarm_model::ScriptedForward;
use uniarm_proto::{ClusterClient, Dice, Exchange, Member, MemberId, Role};
use uniarm_reward::{
    Backbone, RewardCatalogue, RewardEngine, RewardHandle, RewardOptions, server::RewardService,
};
use uniarm_router::{RouterOptions, RouterService};
use uniarm_runtime::{Metrics, drive::Driver};

use crate::{
    model::{CONTEXT_TOKENS, Part, Timed, VOCABULARY},
    network::{Down, Network},
    repeats::Repeating,
    requests::{PLAIN, PROMPTED, SYSTEM},
    server::serve,
    watchers::Watchers,
};

/// The record of a lost process stays so long.
const LEASE: Duration = Duration::from_secs(2);

/// A process that is started again finds the record of its former life for so long at most.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// From SIGTERM to the hand-over, and from there to the cut.
const DRAIN: Duration = Duration::from_millis(250);
const HAND_OVER: Duration = Duration::from_millis(250);

/// The name of the store on the network.
pub const STORE: &str = "store";

/// How a schedule's cluster is built.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub routers: usize,
    pub bases: usize,
    pub rewards: usize,
    pub pace: PaceOptions,
    /// Silence of a reward worker after which base workers ask another one besides.
    pub hedge_after: Option<Duration>,
    /// Blocks of each cache: few mean preemption.
    pub blocks: usize,
    /// Sequences that run at once on a base worker; rows of a step of a reward worker.
    pub places: usize,
    /// Requests of each base worker, and sequences that may wait on a reward worker: few mean full queues.
    pub requests_max: usize,
    pub waiting_max: usize,
    /// How often a message between base and reward worker comes again later.
    pub repeat: f64,
}

pub struct Cluster {
    shape: Shape,
    seed: u64,
    pub network: Network,
    store: MemoryStore,
    watchers: Watchers,
    nodes: BTreeMap<String, Arc<Node>>,
}

/// One host, and the process on it while it runs.
struct Node {
    name: String,
    role: Role,
    life: Mutex<Option<Life>>,
    /// Ends what the process does on its own: watching, and holding its record.
    lives: Mutex<u64>,
}

/// One process.
struct Life {
    served: Served,
    metrics: Metrics,
    /// The server takes no more connections.
    leaving: CancellationToken,
    /// The process is gone.
    ended: CancellationToken,
    registration: Arc<tokio::sync::Mutex<Option<Registration>>>,
    member: Member,
    stopped: Arc<Notify>,
}

#[derive(Clone)]
enum Served {
    Router(RouterService),
    Base(BaseHandle),
    Reward(RewardHandle),
}

impl Shape {
    /// One of each in lock-step, with room for everything.
    pub const UNDISTURBED: Self = Self {
        routers: 1,
        bases: 1,
        rewards: 1,
        pace: PaceOptions { window: DraftWindow::Fixed(0), rows: DraftRows::Auto },
        hedge_after: None,
        blocks: 512,
        places: 32,
        requests_max: 64,
        waiting_max: 256,
        repeat: 0.0,
    };

    pub fn hosts(&self) -> Vec<String> {
        let of = |role: Role, count: usize| (0..count).map(move |index| format!("{role}-{index}"));
        of(Role::Router, self.routers)
            .chain(of(Role::Base, self.bases))
            .chain(of(Role::Reward, self.rewards))
            .collect()
    }

    fn executor(&self, clock: uniarm_engine::Clock, waiting_max: usize) -> ExecutorOptions {
        ExecutorOptions {
            step_tokens: 64,
            prefill_chunk: 32,
            running_max: self.places,
            waiting_max,
            clock,
            ..ExecutorOptions::default()
        }
    }
}

/// The clock of whoever records itself: no host's agrees with another's, nor with what it said before it was set.
fn clocks_that_disagree(seed: u64) -> impl Fn() -> SystemTime + Send + Sync {
    let random = Mutex::new(StdRng::seed_from_u64(seed));
    move || {
        let mut random = random.lock().unwrap_or_else(PoisonError::into_inner);
        SystemTime::UNIX_EPOCH + Duration::from_secs_f64(random.random_range(0.0..86_400.0))
    }
}

// === impl Cluster ===

impl Cluster {
    /// All processes are up and registered.
    pub async fn start(shape: Shape, seed: u64) -> Self {
        let nodes = shape.hosts().into_iter().map(|name| (name.clone(), Arc::new(Node::new(name)))).collect();
        let (network, store) = (Network::new(seed), MemoryStore::with_clock(clocks_that_disagree(seed)));
        let watchers = Watchers::of(store.watch());
        let cluster = Self { shape, seed, network, store, watchers, nodes };
        for host in shape.hosts().iter().rev() {
            cluster.start_process(host).await;
        }
        cluster
    }

    pub fn hosts(&self) -> Vec<String> {
        self.shape.hosts()
    }

    pub fn client(&self, name: &str) -> ClusterClient {
        let routers: Vec<String> = (0..self.shape.routers).map(|index| format!("router-{index}:1")).collect();
        let dialer = self.network.dialer(name);
        ClusterClient::over(&dialer, self.dice(name), &routers).unwrap()
    }

    fn dice(&self, name: &str) -> Dice {
        let salt = name.bytes().fold(self.seed, |salt, byte| salt.rotate_left(7) ^ u64::from(byte));
        Dice::seeded(salt)
    }

    /// Starts the process of a host, and returns when it is registered.
    pub async fn start_process(&self, host: &str) {
        let node = &self.nodes[host];
        let id = MemberId(host.to_owned());
        self.reach_store(host).await;
        let generation = self.store.next_generation(&id).await.unwrap();
        let metrics = Metrics::new();
        let ended = CancellationToken::new();
        let (served, member) = self.serve(node, &metrics, self.view(host, &ended));
        let member = Member { id, generation, address: format!("{host}:1"), ..member };
        let (leaving, stopped) = (CancellationToken::new(), Arc::new(Notify::new()));
        self.spawn_server(host, &served, &member, &leaving, &stopped);
        let registration = self.store.register_within(member.clone(), REGISTER_PATIENCE).await.unwrap();
        let registration = Arc::new(tokio::sync::Mutex::new(Some(registration)));
        let life = Life { served, metrics, leaving, ended, registration, member, stopped };
        *lock(&node.life) = Some(life);
        *lock(&node.lives) += 1;
    }

    fn serve(&self, node: &Node, metrics: &Metrics, view: SnapshotReceiver) -> (Served, Member) {
        let life = *lock(&node.lives);
        let dice = self.dice(&format!("{}:{life}", node.name));
        let dialer = self.network.dialer(&node.name);
        match node.role {
            Role::Router => {
                let options = RouterOptions { requests_max: 4096, dialer, dice, ..RouterOptions::default() };
                (Served::Router(RouterService::new(view, options, metrics)), Member::new(Role::Router))
            }
            Role::Base => {
                let scorer =
                    StoreScorer::new(GrpcScorer { dialer, lanes: None }, view).with_dice(dice.clone());
                let (handle, member) = self.start_base(scorer, dice, metrics);
                (Served::Base(handle), member)
            }
            Role::Reward => {
                let (handle, member) = self.start_reward(metrics);
                (Served::Reward(handle), member)
            }
        }
    }

    fn start_base(&self, scorer: StoreScorer, dice: Dice, metrics: &Metrics) -> (BaseHandle, Member) {
        let settings = BaseSettings {
            model: "scripted".into(),
            fingerprint: [1; 32],
            tokenizer: ScriptedForward::tokenizer(VOCABULARY),
            template: None,
            context_tokens: CONTEXT_TOKENS,
            vocabulary: VOCABULARY,
            exchange: Exchange::Certified,
            list_length: 12,
        };
        let member = settings.member();
        let (model, clock) = Timed::new(Part::Base, self.shape.blocks);
        let options = BaseOptions {
            executor: self.shape.executor(clock, 256),
            requests_max: self.shape.requests_max,
            pace: self.shape.pace,
            hedge_after: self.shape.hedge_after,
            driver: Driver::Task,
            dice: dice.clone(),
        };
        let scorer = Arc::new(Repeating::new(scorer, self.shape.repeat, dice));
        (BaseEngine::start(Box::new(model), settings, scorer, &options, metrics).unwrap(), member)
    }

    fn start_reward(&self, metrics: &Metrics) -> (RewardHandle, Member) {
        let mut catalogue = RewardCatalogue::new(Backbone {
            name: "scripted".into(),
            fingerprint: [2; 32],
            tokenizer: ScriptedForward::tokenizer(VOCABULARY),
            template: None,
            context_tokens: CONTEXT_TOKENS,
            vocabulary: VOCABULARY,
        });
        catalogue.add_plain(PLAIN).unwrap();
        catalogue.add_prompted(PROMPTED, SYSTEM).unwrap();
        let member = catalogue.member();
        let (model, clock) = Timed::new(Part::Reward, self.shape.blocks);
        let executor = self.shape.executor(clock, self.shape.waiting_max);
        let options = RewardOptions { executor, driver: Driver::Task, lanes: None };
        (RewardEngine::start(Box::new(model), catalogue, &options, metrics).unwrap(), member)
    }

    /// The server of one process, until it is told to leave and its connections have ended.
    fn spawn_server(
        &self,
        host: &str,
        served: &Served,
        member: &Member,
        leaving: &CancellationToken,
        stopped: &Arc<Notify>,
    ) {
        let routes = match served.clone() {
            Served::Router(service) => {
                Routes::new(service.inference_server()).add_service(service.status_server())
            }
            Served::Base(handle) => Routes::new(BaseService::new(handle, member.clone()).base_server()),
            Served::Reward(handle) => Routes::new(RewardService::new(handle, member.clone()).reward_server()),
        };
        let serving = serve(routes, self.network.listen(host), leaving.clone());
        let stopped = Arc::clone(stopped);
        tokio::spawn(async move {
            serving.await;
            stopped.notify_one();
        });
    }

    /// What a process sees of the store: late, not while it is cut off, and then the latest at once, as after a
    /// compaction.
    fn view(&self, host: &str, ended: &CancellationToken) -> SnapshotReceiver {
        let mut members = self.watchers.add();
        let (sender, view) = watch::channel(Arc::new(Snapshot::default()));
        let (network, host, ended) = (self.network.clone(), host.to_owned(), ended.clone());
        let follow = async move {
            loop {
                network.passage(STORE, &host).await;
                sender.send_replace(Arc::clone(&members.borrow_and_update()));
                if members.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = ended.cancelled() => {}
                () = follow => {}
            }
        });
        view
    }

    async fn reach_store(&self, host: &str) {
        self.network.passage(host, STORE).await;
        self.network.passage(STORE, host).await;
    }

    /// The process is gone at once. Its record stays until the lease ends.
    pub fn crash(&self, host: &str, down: Down) {
        let Some(life) = lock(&self.nodes[host].life).take() else { return };
        self.network.take_down(host, down);
        life.end();
        tokio::spawn(async move {
            sleep(LEASE).await;
            life.registration.lock().await.take();
        });
    }

    /// SIGTERM: as `Process::serve` of the binary leaves, with a short drain.
    pub async fn stop(&self, host: &str) {
        let Some(life) = lock(&self.nodes[host].life).take() else { return };
        life.served.begin_drain();
        let registration = life.registration.lock().await.take();
        if let Some(registration) = registration {
            self.network.passage(host, STORE).await;
            registration.leave().await;
        }
        self.network.close(host);
        life.leaving.cancel();
        if timeout(DRAIN, life.stopped.notified()).await.is_err() {
            life.served.hand_over();
            let _ = timeout(HAND_OVER, life.stopped.notified()).await;
        }
        self.network.take_down(host, Down::Killed);
        life.end();
    }

    /// The record goes, and comes back: the lease of a process that was too slow, or cut off from the store.
    pub async fn lose_lease(&self, host: &str, for_: Duration) {
        let held = |life: &Life| (Arc::clone(&life.registration), life.member.clone(), life.ended.clone());
        let Some((registration, member, ended)) = lock(&self.nodes[host].life).as_ref().map(held) else {
            return;
        };
        let mut registration = registration.lock().await;
        if registration.take().is_none() {
            return;
        }
        sleep(for_).await;
        if !ended.is_cancelled() {
            *registration = self.store.register_within(member, REGISTER_PATIENCE).await.ok();
        }
    }

    pub fn is_up(&self, host: &str) -> bool {
        lock(&self.nodes[host].life).is_some()
    }

    /// Ends all processes.
    pub async fn shut_down(self) {
        for (host, node) in &self.nodes {
            if let Some(life) = lock(&node.life).take() {
                self.network.take_down(host, Down::Killed);
                life.end();
            }
        }
        self.store.close().await;
    }
}

// === impl Node ===

impl Node {
    fn new(name: String) -> Self {
        let role = match name.split('-').next() {
            Some("router") => Role::Router,
            Some("base") => Role::Base,
            _ => Role::Reward,
        };
        Self { name, role, life: Mutex::default(), lives: Mutex::default() }
    }
}

// === impl Life ===

impl Life {
    fn end(&self) {
        self.leaving.cancel();
        self.ended.cancel();
    }
}

// === impl Served ===

impl Served {
    fn begin_drain(&self) {
        match self {
            Self::Router(service) => service.begin_drain(),
            Self::Base(handle) => handle.begin_drain(),
            Self::Reward(handle) => handle.begin_drain(),
        }
    }

    /// Permits that somebody holds.
    fn places_taken(&self) -> usize {
        match self {
            Self::Router(service) => service.places_taken(),
            Self::Base(handle) => handle.places_taken(),
            Self::Reward(_) => 0,
        }
    }

    fn hand_over(&self) {
        match self {
            Self::Router(service) => service.hand_over(),
            Self::Base(handle) => handle.hand_over(),
            Self::Reward(_) => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
