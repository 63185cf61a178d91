//! etcd behind TLS: members with a certificate that it trusts are recorded, strangers are not.

use std::path::PathBuf;
use std::time::Duration;

use uniarm_cluster::testing::{EtcdServer, ServerFiles};
use uniarm_cluster::{EtcdOptions, EtcdStore, MemberStore as _, TlsFiles};
use uniarm_tls::{Identity, testing::Authority};

use crate::fixtures::{PATIENCE, member, wait_for};

/// Long enough for a refusal or a registration, which takes some milliseconds here.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);

/// Certificate and key of this host. A node of etcd is a client of itself, too.
fn issue(authority: &Authority, name: &str) -> (PathBuf, PathBuf) {
    let Identity { certificate, key, .. } = authority.issue(name, &["127.0.0.1"]);
    (certificate, key)
}

fn store(server: &EtcdServer, tls: Option<TlsFiles>) -> EtcdStore {
    let options = EtcdOptions { tls, ..EtcdOptions::default() };
    EtcdStore::connect(&[server.endpoint()], &options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_members_with_a_trusted_certificate_are_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let theirs = Authority::new(folder.path(), "theirs");
    let (certificate, key) = issue(&ours, "etcd");
    let files = ServerFiles { certificate, key, client_authority: ours.file.clone() };
    let Some(server) = EtcdServer::start_with_tls(files) else { return };
    let known = |authority: &Authority, identity| {
        Some(TlsFiles { authority: Some(authority.file.clone()), identity, domain: None })
    };

    let member_store = store(&server, known(&ours, Some(issue(&ours, "member"))));
    let registered = member_store.register(member("base-0", 1));
    let registration = tokio::time::timeout(PATIENCE, registered).await.unwrap().unwrap();

    for (stranger, tls) in [
        ("without TLS", None),
        ("without a certificate", known(&ours, None)),
        ("with a certificate of somebody else's", known(&ours, Some(issue(&theirs, "stranger")))),
        ("that trusts somebody else", known(&theirs, Some(issue(&ours, "deceived")))),
    ] {
        let store = store(&server, tls);
        let outcome = tokio::time::timeout(REFUSED_WITHIN, store.register(member("base-1", 1))).await;
        assert!(!matches!(outcome, Ok(Ok(_))), "a member {stranger} was recorded");
    }
    let seen = wait_for(&mut member_store.watch(), |snapshot| snapshot.members().len() == 1).await;
    assert!(seen.get(registration.id()).is_some());
}
