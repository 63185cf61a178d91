//! The suite over groups of threads and of TCP connections.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod suite;

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Instant,
};

use suite::{Kind, Rank, group, late};
use uniarm_collective::{Bare, Group, Local, Tcp, Wire, Wires};

const KINDS: [Kind; 5] = [
    kind("local", local),
    kind("tcp", tcp),
    kind("masked tcp", masked),
    Kind { is_late: true, ..kind("late local", |group| late(local(group), group.timeout)) },
    Kind { is_late: true, ..kind("late tcp", |group| late(tcp(group), group.timeout)) },
];

const fn kind(name: &'static str, make: fn(Group) -> Vec<Rank>) -> Kind {
    Kind { name, make, ranks_max: usize::MAX, is_late: false }
}

macro_rules! tests {
    ($($case:ident),* $(,)?) => {
        $(
            #[test]
            fn $case() {
                KINDS.iter().for_each(suite::$case);
            }
        )*
    };
}

all_cases!(tests);

#[test]
fn a_group_of_nobody_is_refused() {
    let none = Local::group(Group { size: 0, ..group(1) }).err().unwrap();
    assert!(none.to_string().contains("size is 0"), "{none}");
}

fn local(group: Group) -> Vec<Rank> {
    Local::group(group).unwrap().into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn tcp(group: Group) -> Vec<Rank> {
    over(&Bare, group)
}

fn masked(group: Group) -> Vec<Rank> {
    over(&Masks, group)
}

fn over(wires: &dyn Wires, group: Group) -> Vec<Rank> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let address = &address;
        let joins: Vec<_> = (1..group.size)
            .map(|rank| scope.spawn(move || Tcp::connect_over(wires, address, rank, group).unwrap()))
            .collect();
        let leader = Tcp::lead_over(wires, &listener, group).unwrap();
        let others = joins.into_iter().map(|join| join.join().unwrap());
        std::iter::once(leader).chain(others).map(|rank| Box::new(rank) as Rank).collect()
    })
}

/// As a wire of TLS: other bytes on the connection than those that were given, some of them held up on either side.
struct Masks;

struct Masked {
    stream: Arc<TcpStream>,
    outbox: Vec<u8>,
    inbox: Vec<u8>,
}

const MASK: u8 = 0x5a;
const OUTBOX_BYTES: usize = 50_000;

impl Wires for Masks {
    fn dial(&self, stream: &Arc<TcpStream>, _deadline: Instant) -> io::Result<Box<dyn Wire>> {
        let (stream, outbox, inbox) = (Arc::clone(stream), Vec::new(), Vec::new());
        Ok(Box::new(Masked { stream, outbox, inbox }))
    }

    fn accept(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        self.dial(stream, deadline)
    }
}

impl Read for Masked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.inbox.is_empty() {
            let mut come = [0; 3000];
            let count = (&*self.stream).read(&mut come)?;
            self.inbox.extend(come[..count].iter().map(|byte| byte ^ MASK));
        }
        let count = buffer.len().min(self.inbox.len());
        buffer[..count].copy_from_slice(&self.inbox[..count]);
        self.inbox.drain(..count);
        Ok(count)
    }
}

impl Write for Masked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.outbox.len() == OUTBOX_BYTES {
            self.flush()?;
        }
        let count = bytes.len().min(OUTBOX_BYTES - self.outbox.len());
        self.outbox.extend(bytes[..count].iter().map(|byte| byte ^ MASK));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let count = (&*self.stream).write(&self.outbox)?;
            self.outbox.drain(..count);
        }
        Ok(())
    }
}
