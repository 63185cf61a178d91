//! Who may speak with whom: a real handshake over loopback for each case.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{io, path::Path};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use uniarm_tls::{ClientTls, Identity, RoleName, ServerTls, testing::Authority};

/// A connection and a byte there and back: a client hears of its refusal only when it reads.
async fn speak(server: &ServerTls, client: &ClientTls, host: &str) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = server.clone();
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await?;
        let mut stream = server.accept(stream).await?;
        let byte = stream.read_u8().await?;
        stream.write_u8(byte + 1).await?;
        stream.shutdown().await
    });
    let said = async {
        let mut stream = client.connect(host, TcpStream::connect(address).await?).await?;
        stream.write_u8(1).await?;
        stream.read_u8().await
    };
    let said = said.await;
    let served = serving.await.unwrap();
    assert_eq!(said.is_ok(), served.is_ok(), "{said:?} and {served:?}");
    said.map(|byte| assert_eq!(byte, 2))
}

fn named(authority: &Authority, roles: &[RoleName]) -> Identity {
    let hosts: Vec<_> = roles.iter().map(|role| role.dns()).collect();
    authority.issue(&format!("{roles:?}"), &hosts)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn processes_know_each_other_by_their_roles_and_nobody_else() {
    use RoleName::{Base, Reward, Router};
    let folder = folder();
    let ours = Authority::new(folder.path(), "ours");
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::new(elsewhere.path(), "theirs");
    let server = ServerTls::mutual(&named(&ours, &[Base]), &[Router]).unwrap();
    let dial = |identity: &Identity, role| ClientTls::mutual(identity, &[role]).unwrap();
    let router = named(&ours, &[Router]);
    let everything = named(&ours, &[Router, Base, Reward]);
    for identity in [&router, &everything] {
        // The address is not in the certificate, and need not be.
        speak(&server, &dial(identity, Base), "127.0.0.1").await.unwrap();
        speak(&server, &dial(identity, Base), "pod-7.somewhere").await.unwrap();
    }
    let expired = ours.issue_expired("expired", &[Router.dns()]);
    let stranger = Identity { authority: ours.file.clone(), ..named(&theirs, &[Router]) };
    for (who, client) in [
        ("a reward worker", dial(&named(&ours, &[Reward]), Base)),
        ("a host without a role", dial(&ours.issue("host", &["127.0.0.1", "localhost"]), Base)),
        ("one whose certificate has expired", dial(&expired, Base)),
        ("one with a certificate of somebody else's", dial(&stranger, Base)),
        ("one without a certificate", ClientTls::of_front_doors(Some(ours.file.clone()), None).unwrap()),
        ("one who looks for a reward worker", dial(&router, Reward)),
        (
            "one who trusts somebody else",
            dial(&Identity { authority: theirs.file.clone(), ..router.clone() }, Base),
        ),
    ] {
        assert!(speak(&server, &client, "base.uniarm.internal").await.is_err(), "{who} came in");
    }
}

#[tokio::test]
async fn a_front_door_is_known_by_its_host() {
    let folder = folder();
    let ours = Authority::new(folder.path(), "ours");
    let Identity { certificate, key, authority } = ours.issue("door", &["localhost", "127.0.0.1"]);
    let door = ServerTls::front(certificate.clone(), key.clone(), None, &[b"h2"]).unwrap();
    let client = ClientTls::of_front_doors(Some(authority.clone()), None).unwrap();
    for host in ["localhost", "127.0.0.1"] {
        speak(&door, &client, host).await.unwrap();
    }
    assert!(speak(&door, &client, "elsewhere").await.is_err());
    let as_browsers_do = ClientTls::of_front_doors(None, None).unwrap();
    assert!(speak(&door, &as_browsers_do, "localhost").await.is_err());

    let closed = ServerTls::front(certificate, key, Some(authority.clone()), &[b"h2"]).unwrap();
    assert!(speak(&closed, &client, "localhost").await.is_err(), "it wants a certificate");
    let guest = ours.issue("guest", &["guest"]);
    let guest = ClientTls::of_front_doors(Some(authority), Some((guest.certificate, guest.key))).unwrap();
    speak(&closed, &guest, "localhost").await.unwrap();
}

#[tokio::test]
async fn files_that_change_count_for_the_next_connection_and_broken_ones_for_none() {
    let folder = folder();
    let old = Authority::new(folder.path(), "old");
    let server = ServerTls::mutual(&old.issue("base", &[RoleName::Base.dns()]), &[RoleName::Router]).unwrap();
    let client =
        ClientTls::mutual(&old.issue("router", &[RoleName::Router.dns()]), &[RoleName::Base]).unwrap();
    speak(&server, &client, "base").await.unwrap();

    // A new certificate of the same authority.
    let renewed = old.issue("base", &[RoleName::Base.dns()]);
    speak(&server, &client, "base").await.unwrap();
    let good = std::fs::read(&renewed.certificate).unwrap();
    std::fs::write(&renewed.certificate, "-----BEGIN CERTIFICATE-----\nnonsense").unwrap();
    speak(&server, &client, "base").await.unwrap();
    std::fs::write(&renewed.certificate, good).unwrap();

    // Another authority: first both are trusted, then both sides change, then the old one goes.
    let new = Authority::new(folder.path(), "new");
    let (first, second) = (std::fs::read(&old.file).unwrap(), std::fs::read(&new.file).unwrap());
    replace(&old.file, &[first, second.clone()].concat());
    let _ = new.issue("base", &[RoleName::Base.dns()]);
    speak(&server, &client, "base").await.unwrap();
    let _ = new.issue("router", &[RoleName::Router.dns()]);
    speak(&server, &client, "base").await.unwrap();
    replace(&old.file, &second);
    speak(&server, &client, "base").await.unwrap();
    let _ = old.issue("router", &[RoleName::Router.dns()]);
    assert!(speak(&server, &client, "base").await.is_err(), "the old authority is trusted no more");
}

fn replace(path: &Path, text: &[u8]) {
    std::fs::write(path.with_extension("fresh"), text).unwrap();
    std::fs::rename(path.with_extension("fresh"), path).unwrap();
}

#[test]
fn what_is_no_certificate_is_named() {
    let folder = folder();
    let ours = Authority::new(folder.path(), "ours");
    let identity = named(&ours, &[RoleName::Base]);
    for (wrong, said) in [
        (Identity { certificate: folder.path().join("none"), ..identity.clone() }, "none"),
        (Identity { certificate: identity.key.clone(), ..identity.clone() }, "has no certificate"),
        (Identity { key: identity.certificate.clone(), ..identity.clone() }, "crt"),
        (Identity { authority: identity.key.clone(), ..identity.clone() }, "has no certificate"),
        (Identity { key: named(&ours, &[RoleName::Router]).key, ..identity.clone() }, "cannot be used"),
    ] {
        let error = ServerTls::mutual(&wrong, &[RoleName::Router]).unwrap_err().to_string();
        assert!(error.contains(said), "{error:?} should have {said:?}");
    }
}
