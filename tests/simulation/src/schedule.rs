//! One schedule: a cluster, what its clients ask and what goes wrong, all of it drawn from a seed.

use std::{fmt, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use uniarm_base::{DraftRows, DraftWindow, PaceOptions};

use crate::{
    cluster::{Cluster, STORE, Shape},
    network::Down,
    requests::{Client, POOL},
};

/// Clients begin, and faults strike, within these times.
const BEGIN_WITHIN_MS: u64 = 250;
const STRIKE_WITHIN_MS: u64 = 500;

/// Everything that a seed stands for.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub seed: u64,
    pub shape: Shape,
    pub clients: Vec<Client>,
    pub faults: Vec<(Duration, Fault)>,
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// The process is gone, and another one starts on its host after a while.
    Crash {
        host: String,
        down: Down,
        starts_after: Duration,
    },
    /// The process is told to leave, and another one starts after it: a step of a rolling update.
    Roll {
        host: String,
    },
    /// Nothing passes from one host to the other, and back only if it is one way.
    Partition {
        from: String,
        to: String,
        is_one_way: bool,
        lasts: Duration,
    },
    /// Nothing passes to a host or from it: a machine that hangs, or lost its network.
    Isolation {
        host: String,
        lasts: Duration,
    },
    /// Each message may take so much longer.
    Slow {
        from: String,
        to: String,
        milliseconds: u64,
    },
    LostLease {
        host: String,
        lasts: Duration,
    },
    /// Nobody reaches the store; then everybody sees the latest at once.
    StoreAway {
        lasts: Duration,
    },
}

// === impl Schedule ===

impl Schedule {
    pub fn drawn(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let shape = shape(&mut random);
        let clients = (0..random.random_range(2..7)).map(|_| client(&mut random)).collect();
        let hosts = shape.hosts();
        let fault = |random: &mut StdRng| {
            (Duration::from_millis(random.random_range(5..STRIKE_WITHIN_MS)), Fault::drawn(&hosts, random))
        };
        let faults = (0..random.random_range(0..5)).map(|_| fault(&mut random)).collect();
        Self { seed, shape, clients, faults }
    }
}

fn shape(random: &mut StdRng) -> Shape {
    let window = match random.random_range(0..5) {
        0 => DraftWindow::Auto,
        index => DraftWindow::Fixed([0, 1, 4, 16][index - 1]),
    };
    let rows = *[DraftRows::Auto, DraftRows::Single, DraftRows::Dual].choose(random).unwrap();
    let is_scarce = random.random_bool(0.25);
    Shape {
        routers: random.random_range(1..3),
        bases: random.random_range(1..4),
        rewards: random.random_range(1..4),
        pace: PaceOptions { window, rows },
        hedge_after: random.random_bool(0.5).then(|| Duration::from_millis(random.random_range(10..300))),
        blocks: if random.random_bool(0.25) { 20 } else { 128 },
        places: if random.random_bool(0.25) { 3 } else { 32 },
        requests_max: if is_scarce { 2 } else { 32 },
        waiting_max: if is_scarce { 2 } else { 128 },
        repeat: if random.random_bool(0.25) { random.random_range(0.0..0.3) } else { 0.0 },
    }
}

fn client(random: &mut StdRng) -> Client {
    Client {
        asked: random.random_range(0..POOL),
        begins: Duration::from_millis(random.random_range(0..BEGIN_WITHIN_MS)),
        timeout: random.random_bool(0.2).then(|| Duration::from_millis(random.random_range(20..4000))),
        rests: Duration::from_millis(if random.random_bool(0.1) { random.random_range(0..200) } else { 0 }),
        hangs_up_after: random.random_bool(0.1).then(|| random.random_range(0..10)),
    }
}

// === impl Fault ===

impl Fault {
    fn drawn(hosts: &[String], random: &mut StdRng) -> Self {
        let mut host = || hosts.choose(random).unwrap().clone();
        let (host, other) = (host(), host());
        let lasts = Duration::from_millis(random.random_range(10..3000));
        match random.random_range(0..12) {
            0..3 => {
                let down = if random.random() { Down::Killed } else { Down::Vanished };
                Self::Crash { host, down, starts_after: lasts }
            }
            3 | 4 => Self::Roll { host },
            5 | 6 => {
                let to = if random.random_bool(0.2) { STORE.to_owned() } else { other };
                Self::Partition { from: host, to, is_one_way: random.random(), lasts }
            }
            7 | 8 => Self::Isolation { host, lasts },
            9 => Self::Slow { from: host, to: other, milliseconds: random.random_range(10..200) },
            10 => Self::LostLease { host, lasts },
            _ => Self::StoreAway { lasts },
        }
    }

    /// Lets it happen, and returns when it is over.
    pub async fn strike(self, cluster: &Cluster) {
        let network = &cluster.network;
        match self {
            Self::Crash { host, down, starts_after } => {
                if cluster.is_up(&host) {
                    cluster.crash(&host, down);
                    tokio::time::sleep(starts_after).await;
                    cluster.start_process(&host).await;
                }
            }
            Self::Roll { host } => {
                if cluster.is_up(&host) {
                    cluster.stop(&host).await;
                    cluster.start_process(&host).await;
                }
            }
            Self::Partition { from, to, is_one_way, lasts } => {
                let mut links = vec![(from.clone(), to.clone())];
                links.extend((!is_one_way).then_some((to, from)));
                hold_up(cluster, &links, lasts).await;
            }
            Self::Isolation { host, lasts } => {
                let others = cluster.hosts().into_iter().filter(|other| *other != host);
                let links: Vec<_> =
                    others.flat_map(|other| [(host.clone(), other.clone()), (other, host.clone())]).collect();
                hold_up(cluster, &links, lasts).await;
            }
            Self::Slow { from, to, milliseconds } => network.set_slow(&from, &to, milliseconds),
            Self::LostLease { host, lasts } => cluster.lose_lease(&host, lasts).await,
            Self::StoreAway { lasts } => {
                let hosts = cluster.hosts().into_iter();
                let links: Vec<_> = hosts
                    .flat_map(|host| [(STORE.to_owned(), host.clone()), (host, STORE.to_owned())])
                    .collect();
                hold_up(cluster, &links, lasts).await;
            }
        }
    }
}

async fn hold_up(cluster: &Cluster, links: &[(String, String)], lasts: Duration) {
    links.iter().for_each(|(from, to)| cluster.network.block(from, to));
    tokio::time::sleep(lasts).await;
    links.iter().for_each(|(from, to)| cluster.network.heal(from, to));
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {:?}", self.seed, self.shape)?;
        self.clients.iter().try_for_each(|client| writeln!(f, "  {client:?}"))?;
        self.faults.iter().try_for_each(|(at, fault)| writeln!(f, "  at {at:?}: {fault:?}"))
    }
}
