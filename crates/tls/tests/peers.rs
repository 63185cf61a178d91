//! Ranks of one group: whom they take for one of theirs, and connections that do not block.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use uniarm_tls::{Identity, PeerStream, PeerTls, RoleName, testing::Authority};

const PATIENCE: Duration = Duration::from_secs(10);

fn pair() -> (Arc<TcpStream>, Arc<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (Arc::new(there), Arc::new(listener.accept().unwrap().0))
}

/// What the caller and the called one say of each other; the caller has said a byte and read one.
fn meet(dialling: &PeerTls, accepting: &PeerTls) -> (io::Result<PeerStream>, io::Result<PeerStream>) {
    let (there, here) = pair();
    thread::scope(|scope| {
        let called = scope.spawn(|| {
            let mut called = accepting.accept(here, Instant::now() + PATIENCE)?;
            let mut byte = [0];
            called.read_exact(&mut byte)?;
            called.write_all(&byte)?;
            Ok(called)
        });
        let caller = dialling.dial(there, Instant::now() + PATIENCE).and_then(|mut caller| {
            caller.write_all(&[7])?;
            let mut byte = [0];
            caller.read_exact(&mut byte)?;
            assert_eq!(byte, [7]);
            Ok(caller)
        });
        (caller, called.join().unwrap())
    })
}

#[test]
fn ranks_take_each_other_in_and_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let elsewhere = tempfile::tempdir().unwrap();
    let theirs = Authority::new(elsewhere.path(), "theirs");
    let of = |role: RoleName| ours.issue(role.dns(), &[role.dns()]);
    let base = |identity: &Identity| PeerTls::mutual(identity, RoleName::Base).unwrap();
    let rank = base(&of(RoleName::Base));
    let (caller, called) = meet(&rank, &base(&of(RoleName::Base)));
    caller.unwrap();
    called.unwrap();

    let stranger =
        Identity { authority: ours.file.clone(), ..theirs.issue("stranger", &["base.uniarm.internal"]) };
    let expired = ours.issue_expired("expired", &[RoleName::Base.dns()]);
    for (who, identity, said) in [
        ("of another authority", stranger, "UnknownCA"),
        ("of another role", of(RoleName::Reward), "BadCertificate"),
        ("that has expired", expired, "CertificateExpired"),
    ] {
        let (caller, called) = meet(&base(&identity), &rank);
        let (caller, called) = (caller.err().unwrap(), called.err().unwrap());
        assert_eq!((caller.kind(), called.kind()), (ErrorKind::InvalidData, ErrorKind::InvalidData), "{who}");
        assert!(caller.to_string().contains(said), "one {who} hears {caller}");
        // And the other way round: who is called is looked at as well.
        let (caller, _) = meet(&rank, &base(&identity));
        assert_eq!(caller.err().unwrap().kind(), ErrorKind::InvalidData, "one {who} was believed");
    }
}

#[test]
fn one_who_says_nothing_or_something_else_is_let_go_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let rank = PeerTls::mutual(&ours.issue("base", &["base.uniarm.internal"]), RoleName::Base).unwrap();
    let began = Instant::now();
    let soon = || Instant::now() + Duration::from_millis(200);
    let (silent, here) = pair();
    assert_eq!(rank.accept(here, soon()).err().unwrap().kind(), ErrorKind::TimedOut);
    assert_eq!(rank.dial(silent, soon()).err().unwrap().kind(), ErrorKind::UnexpectedEof);
    let (plain, here) = pair();
    (&*plain).write_all(b"UCH1 and so on, as ranks say it to each other in the clear").unwrap();
    assert_eq!(rank.accept(here, soon()).err().unwrap().kind(), ErrorKind::InvalidData);
    let (gone, here) = pair();
    drop(gone);
    assert_eq!(rank.accept(here, soon()).err().unwrap().kind(), ErrorKind::UnexpectedEof);
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn two_that_send_each_other_more_than_anything_holds_do_not_wait_for_each_other() {
    const BYTES: usize = 20 << 20;
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new(folder.path(), "ours");
    let rank = PeerTls::mutual(&ours.issue("base", &["base.uniarm.internal"]), RoleName::Base).unwrap();
    let (there, here) = pair();
    let sockets = [Arc::clone(&there), Arc::clone(&here)];
    let (caller, called) = thread::scope(|scope| {
        let called = scope.spawn(|| rank.accept(here, Instant::now() + PATIENCE).unwrap());
        (rank.dial(there, Instant::now() + PATIENCE).unwrap(), called.join().unwrap())
    });
    sockets.iter().for_each(|socket| socket.set_nonblocking(true).unwrap());
    let byte = |index: usize| (index * 31 % 251) as u8;
    thread::scope(|scope| {
        for mut end in [caller, called] {
            scope.spawn(move || {
                let sent: Vec<u8> = (0..BYTES).map(byte).collect();
                let mut received = vec![0; BYTES];
                let (mut out, mut back) = (0, 0);
                let mut is_out = false;
                while !is_out || back < BYTES {
                    match if out < BYTES { end.write(&sent[out..]) } else { end.flush().map(|()| 0) } {
                        Ok(count) => {
                            out += count;
                            is_out = out == BYTES && count == 0;
                        }
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                    match end.read(&mut received[back..]) {
                        Ok(count) => back += count,
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                assert!(received == sent);
            });
        }
    });
}
