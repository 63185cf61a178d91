//! How a group comes to be, and who does not get in.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use uniarm_collective::{Collective as _, CollectiveError, Group, Payload, Tcp};

const GROUP: Group = Group { size: 3, epoch: 9, payload: Payload::F32, timeout: Duration::from_secs(60) };

#[test]
fn strangers_are_turned_away_and_the_group_comes_to_be() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let leader = scope.spawn(|| Tcp::lead(&listener, GROUP).unwrap());
        // One that is silent, one that speaks something else, one that hangs up.
        let silent = TcpStream::connect(address).unwrap();
        let mut browser = TcpStream::connect(address).unwrap();
        browser.write_all(b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n").unwrap();
        drop(TcpStream::connect(address).unwrap());

        let refused = |rank, group| Tcp::connect(address, rank, group).err().unwrap().to_string();
        let yesterday = refused(1, Group { epoch: 8, ..GROUP });
        assert!(yesterday.contains("epoch 9 of the group, not 8"), "{yesterday}");
        let larger = refused(1, Group { size: 4, ..GROUP });
        assert!(larger.contains("3 ranks and sends F32, not 4"), "{larger}");
        let smaller = refused(2, Group { payload: Payload::Bf16, ..GROUP });
        assert!(smaller.contains("not 3 and Bf16"), "{smaller}");

        let two = scope.spawn(|| Tcp::connect(address, 2, GROUP).unwrap());
        thread::sleep(Duration::from_millis(50));
        let again = refused(2, GROUP);
        assert!(again.contains("rank 2 is taken"), "{again}");

        let mut ranks =
            [Tcp::connect(address, 1, GROUP).unwrap(), two.join().unwrap(), leader.join().unwrap()];
        thread::scope(|scope| {
            for rank in &mut ranks {
                scope.spawn(|| {
                    let mut values = [rank.rank() as f32];
                    rank.all_reduce_sum(&mut values).unwrap();
                    assert_eq!(values, [3.0]);
                });
            }
        });
        let mut answer = Vec::new();
        browser.read_to_end(&mut answer).unwrap_or_default();
        assert!(answer.is_empty(), "nobody answers a stranger");
        drop(silent);
    });
}

#[test]
fn a_rank_that_does_not_come_is_named_and_nobody_waits_longer() {
    let group = Group { timeout: Duration::from_millis(300), ..GROUP };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    let began = Instant::now();
    thread::scope(|scope| {
        let early = scope.spawn(|| Tcp::connect(address, 1, group).err().unwrap());
        let error = Tcp::lead(&listener, group).err().unwrap();
        assert!(error.to_string().contains("rank 2 did not come in time"), "{error}");
        assert!(matches!(early.join().unwrap(), CollectiveError::Rendezvous { rank: 1, .. }));
    });
    drop(listener);
    let error = Tcp::connect(address, 1, group).err().unwrap();
    assert!(error.to_string().contains(&format!("at {address}: time is up")), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_rank_that_died_while_it_waited_may_come_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let leader = scope.spawn(|| Tcp::lead(&listener, GROUP).unwrap().barrier());
        // It gives up, which closes its connection as its death would.
        let impatient = Group { timeout: Duration::from_millis(200), ..GROUP };
        Tcp::connect(address, 1, impatient).err().unwrap();
        let one = scope.spawn(|| Tcp::connect(address, 1, GROUP).unwrap().barrier());
        thread::sleep(Duration::from_millis(50));
        let two = scope.spawn(|| Tcp::connect(address, 2, GROUP).unwrap().barrier());
        for rank in [leader, one, two] {
            rank.join().unwrap().unwrap();
        }
    });
}

#[test]
fn a_rank_may_call_before_rank_0_listens() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let group = Group { size: 2, ..GROUP };
    thread::scope(|scope| {
        let early = scope.spawn(|| Tcp::connect(&free, 1, group).unwrap().barrier());
        thread::sleep(Duration::from_millis(100));
        Tcp::connect(&free, 0, group).unwrap().barrier().unwrap();
        early.join().unwrap().unwrap();
    });
}
