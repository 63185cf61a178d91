//! What every member store promises, run against each of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use uniarm_cluster::testing::EtcdServer;
use uniarm_cluster::{EtcdOptions, MemberStore, MemoryStore, RegistrationState, StoreAddress, StoreError};
use uniarm_proto::{Generation, Member, MemberId, Role};

use crate::fixtures::{PATIENCE, adapter, member, wait_for, wait_for_adapters};

/// A kind of store. Every call of `open` is another process that uses the same one.
trait World {
    fn open(&self) -> Arc<dyn MemberStore>;
}

struct MemoryWorld(MemoryStore);

struct EtcdWorld(EtcdServer);

impl World for MemoryWorld {
    fn open(&self) -> Arc<dyn MemberStore> {
        Arc::new(self.0.clone())
    }
}

impl World for EtcdWorld {
    fn open(&self) -> Arc<dyn MemberStore> {
        let address = StoreAddress::parse(&self.0.address()).unwrap();
        uniarm_cluster::open(&address, EtcdOptions::default()).unwrap()
    }
}

/// Every promise, for every store.
macro_rules! conformance {
    ($($promise:ident)*) => {
        mod memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::$promise(&super::MemoryWorld(super::MemoryStore::new())).await;
            })*
        }

        mod etcd {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                if let Some(server) = super::EtcdServer::start() {
                    super::$promise(&super::EtcdWorld(server)).await;
                }
            })*
        }
    };
}

conformance! {
    a_member_that_registers_is_seen_by_every_store
    an_updated_record_is_seen_by_every_store
    a_second_life_is_refused_while_the_first_one_lives
    of_two_lives_that_register_at_once_one_wins
    a_member_that_leaves_or_is_dropped_is_gone_at_once
    generations_grow_over_stores_and_concurrent_callers
    a_closed_store_takes_its_members_along_and_refuses_further_calls
    a_record_that_readers_would_refuse_is_refused_at_once
    an_adapter_that_is_put_is_seen_by_every_store_and_outlives_who_put_it
    of_puts_at_once_none_gets_the_version_of_another
    a_removed_adapter_keeps_its_count_of_versions
    an_adapter_that_readers_would_refuse_is_refused_at_once
}

async fn a_member_that_registers_is_seen_by_every_store(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let (mut seen_by_one, mut seen_by_two) = (one.watch(), two.watch());
    let (base, reward) = (member("base-0", 1), Member { role: Role::Reward, ..member("reward-0", 7) });

    let _base = one.register(base.clone()).await.unwrap();
    let _reward = two.register(reward.clone()).await.unwrap();

    for seen in [&mut seen_by_one, &mut seen_by_two] {
        let snapshot = wait_for(seen, |snapshot| snapshot.members().len() == 2).await;
        assert_eq!(snapshot.get(&base.id).unwrap().as_ref(), &base);
        assert_eq!(snapshot.with_role(Role::Reward).map(AsRef::as_ref).collect::<Vec<_>>(), [&reward]);
        assert!(snapshot.revision() > 0);
    }
    let late = world.open();
    wait_for(&mut late.watch(), |snapshot| snapshot.members().len() == 2).await;
}

async fn an_updated_record_is_seen_by_every_store(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let mut seen = two.watch();
    let original = member("reward-0", 1);
    let registration = one.register(original.clone()).await.unwrap();
    let before = wait_for(&mut seen, |snapshot| !snapshot.members().is_empty()).await;

    let updated = Member { capacity: original.capacity + 1, ..original.clone() };
    registration.update(updated.clone()).unwrap();

    let after = wait_for(&mut seen, |snapshot| *snapshot.members()[0] == updated).await;
    assert!(after.revision() > before.revision());
    let of_another_life = Member { generation: Generation(2), ..updated };
    let refused = registration.update(of_another_life).unwrap_err();
    assert!(matches!(refused, StoreError::InvalidMember(_)), "{refused}");
}

async fn a_second_life_is_refused_while_the_first_one_lives(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let first = one.register(member("base-0", 1)).await.unwrap();

    let refused = two.register(member("base-0", 2)).await.err().unwrap();
    assert!(
        matches!(&refused, StoreError::AlreadyRegistered { id, generation }
            if id.0 == "base-0" && *generation == Generation(1)),
        "{refused}"
    );
    assert_eq!(first.state(), RegistrationState::Held);

    let patient = tokio::spawn(async move {
        two.register_within(member("base-0", 2), PATIENCE).await.map(|held| (two, held))
    });
    first.leave().await;
    let (_two, second) = patient.await.unwrap().unwrap();
    assert_eq!(second.generation(), Generation(2));
}

async fn of_two_lives_that_register_at_once_one_wins(world: &impl World) {
    let stores = [world.open(), world.open()];
    for round in 0..8 {
        let id = format!("base-{round}");
        let (one, two) =
            tokio::join!(stores[0].register(member(&id, 1)), stores[1].register(member(&id, 2)),);
        let winner = match (one, two) {
            (Ok(one), Err(StoreError::AlreadyRegistered { generation: Generation(1), .. })) => one,
            (Err(StoreError::AlreadyRegistered { generation: Generation(2), .. }), Ok(two)) => two,
            (one, two) => panic!("round {round}: {:?}, {:?}", one.err(), two.err()),
        };
        winner.leave().await;
    }
}

async fn a_member_that_leaves_or_is_dropped_is_gone_at_once(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let mut seen = two.watch();
    let leaving = one.register(member("base-0", 1)).await.unwrap();
    let dropped = one.register(member("base-1", 1)).await.unwrap();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 2).await;

    // Well within the lease, whose default is 10 s.
    let soon = Duration::from_secs(5);
    leaving.leave().await;
    drop(dropped);
    let gone = wait_for(&mut seen, |snapshot| snapshot.members().is_empty());
    tokio::time::timeout(soon, gone).await.expect("both are gone long before a lease could run out");

    let again = one.register(member("base-0", 2)).await;
    assert!(again.is_ok(), "the id is free again");
}

async fn generations_grow_over_stores_and_concurrent_callers(world: &impl World) {
    let id = MemberId("reward-0".to_owned());
    let stores = [world.open(), world.open()];
    let mut last = Generation(0);
    for turn in 0..6 {
        let next = stores[turn % 2].next_generation(&id).await.unwrap();
        assert!(next > last, "{next} follows {last}");
        last = next;
    }
    let callers = (0..8).map(|caller| {
        let (store, id) = (stores[caller % 2].clone(), id.clone());
        tokio::spawn(async move { store.next_generation(&id).await.unwrap() })
    });
    let mut distinct = HashSet::new();
    for caller in callers.collect::<Vec<_>>() {
        let generation = caller.await.unwrap();
        assert!(generation > last);
        assert!(distinct.insert(generation), "{generation} was given out twice");
    }
}

async fn a_closed_store_takes_its_members_along_and_refuses_further_calls(world: &impl World) {
    let (closing, staying) = (world.open(), world.open());
    let registration = closing.register(member("base-0", 1)).await.unwrap();
    let mut seen = staying.watch();
    wait_for(&mut seen, |snapshot| snapshot.members().len() == 1).await;

    closing.close().await;

    wait_for(&mut seen, |snapshot| snapshot.members().is_empty()).await;
    registration.lost().await;
    let id = MemberId("base-0".to_owned());
    assert!(matches!(closing.next_generation(&id).await, Err(StoreError::Closed)));
    assert!(matches!(closing.register(member("base-0", 2)).await, Err(StoreError::Closed)));
    registration.leave().await;
}

async fn a_record_that_readers_would_refuse_is_refused_at_once(world: &impl World) {
    let store = world.open();
    for id in ["", &"x".repeat(10_000)] {
        let refused = store.register(member(id, 1)).await.err().unwrap();
        assert!(matches!(refused, StoreError::InvalidMember(_)), "{refused}");
        assert!(!refused.is_retryable());
    }
    assert!(matches!(
        store.next_generation(&MemberId(String::new())).await,
        Err(StoreError::InvalidMember(_))
    ));
}

async fn an_adapter_that_is_put_is_seen_by_every_store_and_outlives_who_put_it(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let mut seen = two.watch_adapters();
    let first = one.put_adapter(adapter("my", 1)).await.unwrap();
    assert_eq!((first.newest().version, first.newest().digest), (1, [1; 32]));
    assert_eq!(one.put_adapter(adapter("my", 1)).await.unwrap(), first, "the same again is no new version");
    let before = wait_for_adapters(&mut seen, |adapters| adapters.get("my").is_some()).await;
    assert_eq!(before.get("my").unwrap().as_ref(), &first);

    let second = one.put_adapter(adapter("my", 2)).await.unwrap();
    let ended = second.versions.iter().map(|version| (version.version, version.retired_at_ms.is_some()));
    assert_eq!(ended.collect::<Vec<_>>(), [(1, true), (2, false)]);
    drop(one);

    let after =
        wait_for_adapters(&mut seen, |adapters| adapters.get("my").unwrap().newest().version == 2).await;
    assert!(after.revision() > before.revision());
    let late = world.open();
    let seen_late = wait_for_adapters(&mut late.watch_adapters(), |adapters| adapters.revision() > 0).await;
    assert_eq!(seen_late.get("my").unwrap().as_ref(), &second);
    assert!(late.watch().borrow().members().is_empty(), "an adapter is no member");
}

async fn of_puts_at_once_none_gets_the_version_of_another(world: &impl World) {
    let stores = [world.open(), world.open()];
    let puts = (1..=8_u8).map(|digest| {
        let store = stores[usize::from(digest) % 2].clone();
        tokio::spawn(async move { store.put_adapter(adapter("my", digest)).await.unwrap() })
    });
    let mut versions = Vec::new();
    for (digest, put) in (1..=8).zip(puts.collect::<Vec<_>>()) {
        let record = put.await.unwrap();
        assert_eq!(record.newest().digest, [digest; 32], "the answer is of one's own put");
        versions.push(record.newest().version);
    }
    versions.sort_unstable();
    assert_eq!(versions, (1..=8).collect::<Vec<_>>());
}

async fn a_removed_adapter_keeps_its_count_of_versions(world: &impl World) {
    let (one, two) = (world.open(), world.open());
    let unknown = one.remove_adapter("my").await.unwrap_err();
    assert!(matches!(&unknown, StoreError::UnknownAdapter { name } if name == "my"), "{unknown}");
    one.put_adapter(adapter("my", 1)).await.unwrap();
    let removed = two.remove_adapter("my").await.unwrap();
    assert!(removed.is_removed());
    assert_eq!(one.remove_adapter("my").await.unwrap(), removed, "removed twice is removed");
    wait_for_adapters(&mut one.watch_adapters(), |adapters| {
        adapters.get("my").is_some_and(|record| record.is_removed())
    })
    .await;
    let back = one.put_adapter(adapter("my", 1)).await.unwrap();
    assert_eq!((back.newest().version, back.is_removed()), (2, false));
}

async fn an_adapter_that_readers_would_refuse_is_refused_at_once(world: &impl World) {
    let store = world.open();
    for name in ["", "my@1", "a/b", &"x".repeat(129)] {
        let refused = store.put_adapter(adapter(name, 1)).await.unwrap_err();
        assert!(matches!(refused, StoreError::InvalidAdapter(_)) && !refused.is_retryable(), "{refused}");
    }
    store.close().await;
    assert!(matches!(store.put_adapter(adapter("my", 1)).await, Err(StoreError::Closed)));
    assert!(matches!(store.remove_adapter("my").await, Err(StoreError::Closed)));
}
