//! What the store in etcd survives: killed members, a killed etcd, a lost disk, a cut link, a busy process.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uniarm_cluster::testing::EtcdServer;
use uniarm_cluster::{
    Credentials, EtcdOptions, EtcdStore, MemberStore, RegistrationState, SnapshotReceiver, StoreError,
};
use uniarm_proto::{Generation, MemberId};

use crate::fixtures::{PATIENCE, member, wait_for, wait_for_state};
use crate::link::Link;

/// The shortest that etcd grants, so that the tests need not wait longer.
const LEASE_TTL: Duration = Duration::from_secs(2);

/// Tells the process that `a_killed_member_is_gone_when_its_lease_ends` starts which etcd to use.
const HOLDER_VARIABLE: &str = "UNIARM_TEST_HOLDER_OF";

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_member_is_gone_when_its_lease_ends() {
    let Some(server) = EtcdServer::start() else { return };
    let store = open(&server.endpoint());
    let mut seen = store.watch();
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::holder_process", "--ignored", "--nocapture"])
        .env(HOLDER_VARIABLE, server.endpoint())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
    // Longer than the lease: it is alive because it is renewed.
    tokio::time::sleep(LEASE_TTL * 2).await;
    assert_eq!(seen.borrow().members().len(), 1);

    holder.kill().unwrap();
    holder.wait().unwrap();
    let killed = Instant::now();

    let next_life = store.register_within(member("base-0", 2), PATIENCE).await.unwrap();
    let waited = killed.elapsed();
    // etcd looks for expired leases twice a second, and the id is tried again four times a second.
    assert!(waited < LEASE_TTL * 2, "the id was taken for {waited:?}");
    assert_eq!(next_life.generation(), Generation(2));
}

/// Not a test of its own: the member that the test above kills.
#[tokio::test]
#[ignore = "run by a_killed_member_is_gone_when_its_lease_ends"]
async fn holder_process() {
    let store = open(&std::env::var(HOLDER_VARIABLE).unwrap());
    let _registration = store.register(member("base-0", 1)).await.unwrap();
    tokio::time::sleep(PATIENCE * 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_killed_and_started_again_loses_nobody() {
    let Some(mut server) = EtcdServer::start() else { return };
    let (one, two) = (open(&server.endpoint()), open(&server.endpoint()));
    let registration = one.register(member("base-0", 1)).await.unwrap();
    let mut seen = two.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
    let always_there = Witness::of(two.watch());

    server.kill();
    // Longer than the lease: nobody can renew, and nobody can expire.
    tokio::time::sleep(LEASE_TTL * 2).await;
    assert_eq!(registration.state(), RegistrationState::Lost, "its holder knows that it cannot be sure");
    server.restart();

    wait_for_state(&registration, RegistrationState::Held).await;
    always_there.testify().await;
    // The watch goes on where it broke, and new members are let in.
    let newcomer = two.register(member("base-1", 1)).await.unwrap();
    wait_for(&mut one.watch(), |snapshot| snapshot.members().len() == 2).await;
    registration.leave().await;
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
    newcomer.leave().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_an_etcd_that_lost_its_data_register_themselves_again() {
    let Some(mut server) = EtcdServer::start() else { return };
    let (one, two) = (open(&server.endpoint()), open(&server.endpoint()));
    let dead = two.register(member("dead", 1)).await.unwrap();
    let registration = one.register(member("base-0", 1)).await.unwrap();
    let generation = one.next_generation(registration.id()).await.unwrap();
    let watching = open(&server.endpoint());
    let mut seen = watching.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 2).await;
    let always_there = Witness::of(watching.watch());

    server.kill();
    // It cannot take its record back, because there is no etcd; the lost data does it.
    drop((dead, two));
    server.lose_data();
    server.restart();

    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
    wait_for_state(&registration, RegistrationState::Held).await;
    always_there.testify().await;
    let fresh = open(&server.endpoint());
    wait_for(&mut fresh.watch(), |snapshot| snapshot.get(registration.id()).is_some()).await;
    assert!(
        fresh.next_generation(registration.id()).await.unwrap() > generation,
        "although the count is lost"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_missed_compacted_changes_lists_the_members_again() {
    let Some(server) = EtcdServer::start() else { return };
    let link = Link::to(server.endpoint()).await;
    let (one, cut_off) = (open(&server.endpoint()), open(&link.endpoint()));
    let first = one.register(member("base-0", 1)).await.unwrap();
    let mut seen = cut_off.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;

    link.cut();
    first.leave().await;
    let ids = ["base-1", "base-2"];
    let mut held = Vec::new();
    for id in ids {
        held.push(one.register(member(id, 1)).await.unwrap());
    }
    compact(&server.endpoint()).await;
    assert_eq!(seen.borrow().members().len(), 1, "the last snapshot stays");
    link.mend();

    let snapshot = wait_for(&mut seen, |snapshot| snapshot.members().len() == 2).await;
    assert!(snapshot.members().iter().map(|member| &member.id.0[..]).eq(ids), "{snapshot:?}");
    held.pop().unwrap().leave().await;
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_cut_off_for_longer_than_its_lease_comes_back_unless_another_life_took_its_id() {
    let Some(server) = EtcdServer::start() else { return };
    let link = Link::to(server.endpoint()).await;
    let (cut_off, other) = (open(&link.endpoint()), open(&server.endpoint()));
    let mut seen = other.watch();
    let registration = cut_off.register(member("base-0", 1)).await.unwrap();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;

    link.cut();
    wait_for(&mut seen, |snapshot| snapshot.members().is_empty()).await;
    wait_for_state(&registration, RegistrationState::Lost).await;
    link.mend();
    wait_for_state(&registration, RegistrationState::Held).await;
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;

    link.cut();
    let next_life = other.register_within(member("base-0", 2), PATIENCE).await.unwrap();
    link.mend();
    wait_for_state(&registration, RegistrationState::Superseded { by: Generation(2) }).await;
    registration.leave().await;
    assert_eq!(next_life.state(), RegistrationState::Held, "the former life cannot remove the next one");
    let snapshot = wait_for(&mut seen, |snapshot| !snapshot.members().is_empty()).await;
    assert_eq!(snapshot.members()[0].generation, Generation(2));
}

#[tokio::test]
async fn a_process_whose_only_worker_thread_is_busy_keeps_its_membership() {
    let Some(server) = EtcdServer::start() else { return };
    let (busy, watching) = (open(&server.endpoint()), open(&server.endpoint()));
    let registration = busy.register(member("base-0", 1)).await.unwrap();
    let mut seen = watching.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;
    let before = seen.borrow_and_update().revision();

    // This test's runtime has this one thread, as an engine that never yields would have it.
    std::thread::sleep(LEASE_TTL * 3);

    assert_eq!(registration.state(), RegistrationState::Held);
    assert_eq!(seen.borrow().revision(), before, "the record was never touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_starts_before_etcd_waits_for_it() {
    let Some(mut server) = EtcdServer::stopped() else { return };
    let store = Arc::new(open(&server.endpoint()));
    let early = tokio::spawn({
        let store = store.clone();
        async move {
            let generation = store.next_generation(&MemberId("base-0".to_owned())).await.unwrap();
            store.register(member("base-0", generation.0)).await.unwrap()
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!early.is_finished());
    assert_eq!(store.watch().borrow().revision(), 0, "nothing is known yet, not even that nobody is there");

    server.restart();

    let registration = tokio::time::timeout(PATIENCE, early).await.unwrap().unwrap();
    wait_for(&mut store.watch(), |snapshot| snapshot.get(registration.id()).is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_asked_for_and_outlive_a_restart_of_etcd() {
    let Some(mut server) = EtcdServer::start() else { return };
    require_password(&server.endpoint(), "secret").await;
    let with_password = |password: &str| {
        let credentials = Credentials { user: "root".to_owned(), password: password.to_owned() };
        let options = EtcdOptions { credentials: Some(credentials), ..options() };
        EtcdStore::connect(&[server.endpoint()], &options).unwrap()
    };
    let admitted = with_password("secret");
    for refused in [open(&server.endpoint()), with_password("guess")] {
        let error = tokio::time::timeout(PATIENCE, refused.register(member("base-0", 9)))
            .await
            .unwrap()
            .err()
            .unwrap();
        assert!(matches!(error, StoreError::Refused(_)) && !error.is_retryable(), "{error:?}");
    }
    let registration = admitted.register(member("base-0", 1)).await.unwrap();
    let mut seen = admitted.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;

    // The tokens that etcd gave out die with it.
    server.kill();
    server.restart();
    tokio::time::sleep(LEASE_TTL * 2).await;

    wait_for_state(&registration, RegistrationState::Held).await;
    registration.leave().await;
    wait_for(&mut seen, |snapshot| snapshot.members().is_empty()).await;
}

/// Sees every snapshot from its beginning on, and that none was without the member.
struct Witness {
    watching: tokio::task::JoinHandle<()>,
    stop: tokio::sync::oneshot::Sender<()>,
}

impl Witness {
    fn of(mut seen: SnapshotReceiver) -> Self {
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        let watching = tokio::spawn(async move {
            loop {
                assert!(
                    seen.borrow_and_update().get(&MemberId("base-0".to_owned())).is_some(),
                    "the member vanished"
                );
                tokio::select! {
                    changed = seen.changed() => changed.unwrap(),
                    _ = &mut stopped => return,
                }
            }
        });
        Self { watching, stop }
    }

    async fn testify(self) {
        let _ = self.stop.send(());
        self.watching.await.unwrap();
    }
}

fn options() -> EtcdOptions {
    EtcdOptions { lease_ttl: LEASE_TTL, ..EtcdOptions::default() }
}

fn open(endpoint: &str) -> EtcdStore {
    EtcdStore::connect(&[endpoint.to_owned()], &options()).unwrap()
}

pub async fn compact(endpoint: &str) {
    let mut client = etcd_client::Client::connect([endpoint], None).await.unwrap();
    let revision = client.get("nothing", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
}

async fn require_password(endpoint: &str, password: &str) {
    let mut client = etcd_client::Client::connect([endpoint], None).await.unwrap();
    client.role_add("root").await.unwrap();
    client.user_add("root", password, None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.auth_enable().await.unwrap();
}
