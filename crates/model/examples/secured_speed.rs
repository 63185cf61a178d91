//! What mutual TLS between two ranks costs: an all-reduce over loopback, bare and secured, in turns.
//!
//! `cargo run --release -p uniarm-model --example secured_speed`

use std::{
    error::Error,
    io,
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use uniarm_collective::{Bare, Collective as _, Group, Payload, Tcp, Wire, Wires};
use uniarm_tls::{PeerTls, RoleName, testing::Authority};

const REPETITIONS: usize = 101;
/// A row of SmolLM2-135M, eight of them, and more than any step sends.
const NUMBERS: [usize; 5] = [576, 8 * 576, 16 << 10, 256 << 10, 4 << 20];

struct Secured(PeerTls);

impl Wires for Secured {
    fn dial(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(self.0.dial(Arc::clone(stream), deadline)?))
    }

    fn accept(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(self.0.accept(Arc::clone(stream), deadline)?))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let identity = Authority::new(folder.path(), "ours").issue("base", &[RoleName::Base.dns()]);
    let secured = Secured(PeerTls::mutual(&identity, RoleName::Base)?);
    println!("bytes per rank            bare            TLS    times");
    for count in NUMBERS {
        // The better of two medians each: the machine has other users.
        let best = |wires: &dyn Wires| {
            Ok::<_, Box<dyn Error>>(all_reduce(wires, count)?.min(all_reduce(wires, count)?))
        };
        let (bare, tls) = (best(&Bare)?, best(&secured)?);
        let times = tls.as_secs_f64() / bare.as_secs_f64();
        println!("{:>14} {bare:>15.1?} {tls:>14.1?} {times:>8.2}", count * 4);
    }
    Ok(())
}

/// The median time of one call.
fn all_reduce(wires: &dyn Wires, count: usize) -> Result<Duration, Box<dyn Error>> {
    let group = Group { size: 2, epoch: 1, payload: Payload::F32, timeout: Duration::from_secs(60) };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let work = |mut rank: Tcp| {
        let mut values = vec![1e-9; count];
        let times = (0..REPETITIONS).map(|_| {
            let began = Instant::now();
            rank.all_reduce_sum(&mut values).map(|()| began.elapsed())
        });
        times.collect::<Result<Vec<_>, _>>()
    };
    let mut times = thread::scope(|scope| {
        let other = scope.spawn(|| work(Tcp::connect_over(wires, &address, 1, group)?));
        let times = work(Tcp::lead_over(wires, &listener, group)?)?;
        other.join().expect("the other rank does not panic")?;
        Ok::<_, Box<dyn Error>>(times)
    })?;
    times.sort();
    Ok(times[times.len() / 2])
}
