//! etcd behind TLS: members with a certificate that it trusts are recorded, strangers are not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use uniarm_cluster::testing::{EtcdServer, ServerFiles};
use uniarm_cluster::{EtcdOptions, EtcdStore, MemberStore as _, TlsFiles};

use crate::fixtures::{PATIENCE, member, wait_for};

/// Long enough for a refusal or a registration, which takes some milliseconds here.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);

/// Signs certificates, and says in a file who it is.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
    file: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), folder: folder.to_owned(), file }
    }

    /// Files of a certificate for this host, and of its key.
    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        // A node of etcd is a client of itself, too.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = ["crt", "key"].map(|kind| self.folder.join(format!("{name}.{kind}")));
        std::fs::write(&files[0], certificate.pem()).unwrap();
        std::fs::write(&files[1], key.serialize_pem()).unwrap();
        files.into()
    }
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
    let (certificate, key) = ours.issue("etcd");
    let files = ServerFiles { certificate, key, client_authority: ours.file.clone() };
    let Some(server) = EtcdServer::start_with_tls(files) else { return };
    let known = |authority: &Authority, identity| {
        Some(TlsFiles { authority: Some(authority.file.clone()), identity, domain: None })
    };

    let member_store = store(&server, known(&ours, Some(ours.issue("member"))));
    let registered = member_store.register(member("base-0", 1));
    let registration = tokio::time::timeout(PATIENCE, registered).await.unwrap().unwrap();

    for (stranger, tls) in [
        ("without TLS", None),
        ("without a certificate", known(&ours, None)),
        ("with a certificate of somebody else's", known(&ours, Some(theirs.issue("stranger")))),
        ("that trusts somebody else", known(&theirs, Some(ours.issue("deceived")))),
    ] {
        let store = store(&server, tls);
        let outcome = tokio::time::timeout(REFUSED_WITHIN, store.register(member("base-1", 1))).await;
        assert!(!matches!(outcome, Ok(Ok(_))), "a member {stranger} was recorded");
    }
    let seen = wait_for(&mut member_store.watch(), |snapshot| snapshot.members().len() == 1).await;
    assert!(seen.get(registration.id()).is_some());
}
