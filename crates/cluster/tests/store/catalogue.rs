//! The catalogue in etcd: what its readers see after an outage and a compaction, and what a put does to a record of others.

use std::time::Duration;

use uniarm_cluster::testing::EtcdServer;
use uniarm_cluster::{EtcdOptions, EtcdStore, MemberStore as _, StoreError};

use crate::faults::compact;
use crate::fixtures::{adapter, wait_for_adapters};
use crate::link::Link;

/// The shortest that etcd grants.
const LEASE_TTL: Duration = Duration::from_secs(2);

fn open(endpoint: &str) -> EtcdStore {
    let options = EtcdOptions { lease_ttl: LEASE_TTL, ..EtcdOptions::default() };
    EtcdStore::connect(&[endpoint.to_owned()], &options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_missed_compacted_changes_lists_the_adapters_again() {
    let Some(server) = EtcdServer::start() else { return };
    let link = Link::to(server.endpoint()).await;
    let (one, cut_off) = (open(&server.endpoint()), open(&link.endpoint()));
    one.put_adapter(adapter("my", 1)).await.unwrap();
    let mut seen = cut_off.watch_adapters();
    wait_for_adapters(&mut seen, |adapters| adapters.get("my").is_some()).await;

    link.cut();
    one.put_adapter(adapter("my", 2)).await.unwrap();
    one.put_adapter(adapter("your", 1)).await.unwrap();
    compact(&server.endpoint()).await;
    assert_eq!(seen.borrow().get("my").unwrap().newest().version, 1, "the last list stays");
    link.mend();

    let listed = wait_for_adapters(&mut seen, |adapters| adapters.get("your").is_some()).await;
    assert_eq!(listed.get("my").unwrap().newest().version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_is_there_after_etcd_was_killed_and_a_put_waits_for_it() {
    let Some(mut server) = EtcdServer::start() else { return };
    let store = open(&server.endpoint());
    store.put_adapter(adapter("my", 1)).await.unwrap();
    server.kill();
    let (put, ()) = tokio::join!(store.put_adapter(adapter("my", 2)), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        tokio::task::block_in_place(|| server.restart());
    });
    assert_eq!(put.unwrap().newest().version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_nobody_can_read_is_neither_seen_nor_written_over() {
    let Some(server) = EtcdServer::start() else { return };
    let store = open(&server.endpoint());
    store.put_adapter(adapter("your", 1)).await.unwrap();
    let mut client = etcd_client::Client::connect([server.endpoint()], None).await.unwrap();
    client.put("/uniarm/v1/adapters/my", "of a later version of the product", None).await.unwrap();
    let error = store.put_adapter(adapter("my", 1)).await.unwrap_err();
    assert!(matches!(error, StoreError::InvalidAdapter(_)) && !error.is_retryable(), "{error}");
    let mut seen = store.watch_adapters();
    let listed = wait_for_adapters(&mut seen, |adapters| adapters.revision() > 0).await;
    assert_eq!(listed.records().len(), 1);
}
