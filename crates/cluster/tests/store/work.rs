//! Work that processes share: each piece is one process's, until it is finished or the process is gone.

use std::time::{Duration, Instant};

use uniarm_cluster::testing::EtcdServer;
use uniarm_cluster::{Claim, Claimed, EtcdOptions, Work};

use crate::fixtures::PATIENCE;

/// The shortest that etcd grants.
const LEASE_TTL: Duration = Duration::from_secs(2);

fn work(server: &EtcdServer, name: &str) -> Work {
    let options = EtcdOptions { lease_ttl: LEASE_TTL, ..EtcdOptions::default() };
    Work::new(&[server.endpoint()], &options, name, PATIENCE).unwrap()
}

async fn taken(work: &Work, piece: &str) -> Claim {
    match work.claim(piece).await.unwrap() {
        Claimed::Mine(claim) => claim,
        other => panic!("{piece}: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_is_one_processs_and_is_finished_once() {
    let Some(server) = EtcdServer::start() else { return };
    let (one, two, elsewhere) = (work(&server, "job"), work(&server, "job"), work(&server, "other"));
    assert_eq!(one.describe(b"this").await.unwrap(), (b"this".to_vec(), true));
    assert_eq!(two.describe(b"that").await.unwrap(), (b"this".to_vec(), false));

    let claim = taken(&one, "000001").await;
    assert_eq!(two.claim("000001").await.unwrap(), Claimed::Others);
    assert_eq!(taken(&one, "000001").await, claim, "asked again it is the same claim: answers get lost");
    taken(&elsewhere, "000001").await;
    taken(&two, "000002").await;
    assert!(one.finish(&claim, b"record").await.unwrap());
    assert!(one.finish(&claim, b"record").await.unwrap(), "told twice, the same record is the same finish");
    assert!(!one.finish(&claim, b"another").await.unwrap());
    assert_eq!(two.claim("000001").await.unwrap(), Claimed::Finished(b"record".to_vec()));

    let state = two.state().await.unwrap();
    assert_eq!(state.finished.into_iter().collect::<Vec<_>>(), [("000001".to_owned(), b"record".to_vec())]);
    assert_eq!(state.claimed.into_iter().collect::<Vec<_>>(), ["000002"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lost_a_piece_cannot_finish_it() {
    let Some(server) = EtcdServer::start() else { return };
    let (stopped, next) = (work(&server, "job"), work(&server, "job"));
    let old = taken(&stopped, "p").await;
    stopped.leave().await;
    let new = taken(&next, "p").await;
    assert!(new.revision() > old.revision());
    assert!(!stopped.finish(&old, b"late").await.unwrap());
    assert!(next.finish(&new, b"in time").await.unwrap());
    assert!(!stopped.finish(&old, b"later").await.unwrap());
    assert_eq!(stopped.claim("p").await.unwrap(), Claimed::Finished(b"in time".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_kept_while_its_process_lives_and_ends_soon_after_it() {
    let Some(server) = EtcdServer::start() else { return };
    let (kept, next) = (work(&server, "job"), work(&server, "job"));
    taken(&kept, "p").await;
    tokio::time::sleep(2 * LEASE_TTL).await;
    assert_eq!(next.claim("p").await.unwrap(), Claimed::Others);
    drop(kept);
    let began = Instant::now();
    while next.claim("p").await.unwrap() == Claimed::Others {
        assert!(began.elapsed() < PATIENCE, "the claim outlives its process");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hung_past_its_lease_takes_pieces_again() {
    let Some(server) = EtcdServer::start() else { return };
    let hung = work(&server, "job");
    let lost = taken(&hung, "p").await;
    // As after SIGSTOP for too long: the lease is gone, and nobody has told its process.
    let mut client = etcd_client::Client::connect([server.endpoint()], None).await.unwrap();
    for lease in client.leases().await.unwrap().leases() {
        client.lease_revoke(lease.id()).await.unwrap();
    }
    let began = Instant::now();
    let again = taken(&hung, "p").await;
    assert!(began.elapsed() < 2 * LEASE_TTL, "{:?}", began.elapsed());
    assert!(!hung.finish(&lost, b"old").await.unwrap());
    assert!(hung.finish(&again, b"new").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_waits_for_an_etcd_that_is_away() {
    let Some(mut server) = EtcdServer::start() else { return };
    let work = work(&server, "job");
    let claim = taken(&work, "p").await;
    server.kill();
    let (finished, ()) = tokio::join!(work.finish(&claim, b"record"), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        tokio::task::block_in_place(|| server.restart());
    });
    assert!(finished.unwrap());
}

#[test]
fn a_name_that_cannot_be_part_of_a_key_is_refused() {
    let refused =
        |name: &str| Work::new(&["127.0.0.1:1".to_owned()], &EtcdOptions::default(), name, PATIENCE).err();
    for name in ["", "a/b", "ä", "two words", &"x".repeat(200)] {
        let error = refused(name).map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("the job name"), "{name:?}: {error}");
    }
    assert!(refused("sweep-1_a.b").is_none());
}
