//! Processes on hosts of their own are cut off from each other, lose packets, and get a narrow line.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use uniarm_cluster::testing::etcd_binary;

use crate::{
    fleet::{BASES, Fleet, MEMBERS, Places, ROUTERS, floor_of_silence},
    harness::{demo_model, machine},
    network::{Cut, Network},
    trio::NODES,
    weather::{Diary, Happened, Load, weather},
};

/// Hosts: the members, the nodes of etcd, and the clients.
const CLIENTS: usize = MEMBERS + NODES;

/// Long enough that everybody has to notice: keepalive takes 4 s.
const CUT: Duration = Duration::from_secs(6);

/// Between two faults: what was cut finds together again.
const PAUSE: Duration = Duration::from_secs(3);

/// A fault that harms all the while.
const LASTING: Duration = Duration::from_secs(60);
const LASTING_SHORT: Duration = Duration::from_secs(5);

/// Every partition so often.
const ROUNDS: usize = 2;

const LOSS: f64 = 0.05;

/// A whole row of logits, 200 KB, takes nearly half a second of it.
const NARROW_KILOBITS: u32 = 4_000;

/// A partition by name: what is cut, and how long somebody has to wait at least.
type Partition = (&'static str, Vec<Cut>, Duration);

fn routers() -> std::ops::Range<usize> {
    0..ROUTERS
}

fn bases() -> std::ops::Range<usize> {
    ROUTERS..ROUTERS + BASES
}

fn rewards() -> std::ops::Range<usize> {
    ROUTERS + BASES..MEMBERS
}

fn stores() -> std::ops::Range<usize> {
    MEMBERS..MEMBERS + NODES
}

/// Each of the first from each of the second.
fn all(some: impl Iterator<Item = usize>, others: &(impl Iterator<Item = usize> + Clone)) -> Vec<Cut> {
    some.flat_map(|one| others.clone().map(move |other| Cut::Both(one, other))).collect()
}

/// One of each kind.
fn few_partitions() -> Vec<Partition> {
    let (base, reward) = (bases().start, rewards().start);
    let noticed = floor_of_silence(CUT);
    vec![
        ("base | reward", vec![Cut::Both(base, reward)], noticed),
        ("router > base", vec![Cut::OneWay(0, base + 1)], noticed),
        ("all bases | all rewards", all(bases(), &rewards()), CUT),
    ]
}

/// Every pair of pools, both ways and each way; one member cut off from everybody; and whole pools.
fn partitions() -> Vec<Partition> {
    let (router, base, reward) = (routers().start, bases().start, rewards().start);
    let noticed = floor_of_silence(CUT);
    let pairs = [
        ["base | reward", "base > reward", "reward > base"],
        ["router | base", "router > base", "base > router"],
        ["client | router", "client > router", "router > client"],
    ];
    let ends = [(base, reward), (router, base + 1), (CLIENTS, router)];
    let mut partitions: Vec<Partition> = Vec::new();
    for ([both, there, back], (a, b)) in pairs.into_iter().zip(ends) {
        partitions.push((both, vec![Cut::Both(a, b)], noticed));
        partitions.push((there, vec![Cut::OneWay(a, b)], noticed));
        partitions.push((back, vec![Cut::OneWay(b, a)], noticed));
    }
    let others = |member: usize| (0..=CLIENTS).filter(move |other| *other != member);
    for (name, member) in [("a base alone", base), ("a reward alone", reward + 1)] {
        partitions.push((name, all(member..member + 1, &others(member)), noticed));
    }
    // Its record ends with its lease, while its streams run.
    partitions.push(("base | etcd", all(base..base + 1, &stores()), Duration::ZERO));
    partitions.push(("all bases | all rewards", all(bases(), &rewards()), CUT));
    partitions.push(("all routers | all bases", all(routers(), &bases()), CUT));
    partitions
}

fn undergo(network: &Network, partitions: Vec<Partition>, diary: &Diary) {
    for (name, cuts, floor) in partitions {
        thread::sleep(PAUSE);
        let happened = Happened { at: Instant::now(), what: name.to_owned(), lasts: Duration::ZERO, floor };
        diary.lock().unwrap().push(happened);
        network.cut(&cuts);
        thread::sleep(CUT);
        network.mend(&cuts);
    }
}

/// While packets are lost, and then while one reward worker has a narrow line.
fn undergo_bad_lines(network: &Network, lasts: Duration, diary: &Diary) {
    let begin = |what: String| {
        thread::sleep(PAUSE);
        let happened = Happened { at: Instant::now(), what, lasts, floor: Duration::ZERO };
        diary.lock().unwrap().push(happened);
    };
    match network.lose(LOSS) {
        Ok(()) => {
            begin(format!("{:.0} % of packets lost", 100.0 * LOSS));
            thread::sleep(lasts);
            network.keep(LOSS).unwrap();
        }
        Err(reason) => println!("skipped: lost packets, {reason}"),
    }
    begin(format!("a reward behind {NARROW_KILOBITS} kbit/s"));
    network.narrow(rewards().start, NARROW_KILOBITS);
    thread::sleep(lasts);
    network.widen(rewards().start);
}

/// A fleet on hosts of its own, and clients on one, under a steady load while the network is bad.
fn on_hosts(load: Load, disturb: impl FnOnce(&Network, &Diary) + Send + 'static) {
    let _machine = machine();
    let network = match Network::lay(CLIENTS + 1) {
        Ok(network) => Arc::new(network),
        Err(reason) => return println!("skipped: {reason}"),
    };
    // Whatever has to be fetched first: no host of this network reaches any other.
    demo_model();
    let _ = etcd_binary();
    let clients = thread::spawn(move || {
        // The threads of the runtime are started by this one.
        network.enter(CLIENTS);
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let places = Places {
            members: std::array::from_fn(|member| network.host(member)),
            etcd: std::array::from_fn(|node| network.host(stores().start + node)),
        };
        let fleet = Fleet::start_at(&places, &[]);
        // The network stays until the last stream has ended.
        let lent = Arc::clone(&network);
        runtime.block_on(weather(fleet, load, move |_, diary| disturb(&lent, diary)));
    });
    clients.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn partitions_loss_and_narrow_lines_leave_every_stream_as_it_was() {
    let load = Load { different: 12, tokens: 24, together: 4, streams: 12 };
    on_hosts(load, |network, diary| {
        undergo(network, few_partitions(), diary);
        undergo_bad_lines(network, LASTING_SHORT, diary);
    });
}

#[test]
#[ignore = "takes minutes: make test-faults"]
fn every_partition_again_and_again_leaves_every_stream_as_it_was() {
    let load = Load { different: 24, tokens: 24, together: 8, streams: 48 };
    on_hosts(load, |network, diary| {
        for _ in 0..ROUNDS {
            undergo(network, partitions(), diary);
        }
        undergo_bad_lines(network, LASTING, diary);
    });
}
