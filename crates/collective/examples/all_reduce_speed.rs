//! An all-reduce between two ranks over loopback, beside the floor: the same bytes through a bare connection, both ways.
//!
//! `cargo run --release -p uniarm-collective --example all_reduce_speed`

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use uniarm_collective::{Collective as _, Group, Payload, Tcp};

const REPETITIONS: usize = 41;
const NUMBERS: [usize; 4] = [256, 16 << 10, 1_310_720, 4 << 20];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("bytes per rank      all-reduce   bf16 payload          floor   of the floor");
    for count in NUMBERS {
        let floor = floor(count * 4)?;
        let [whole, half] = [Payload::F32, Payload::Bf16].map(|payload| all_reduce(count, payload));
        let (whole, half) = (whole?, half?);
        let share = floor.as_secs_f64() / whole.as_secs_f64();
        println!("{:>14} {whole:>15.1?} {half:>14.1?} {floor:>14.1?} {share:>14.2}", count * 4);
    }
    Ok(())
}

/// The median time of one call.
fn all_reduce(count: usize, payload: Payload) -> Result<Duration, Box<dyn std::error::Error>> {
    let group = Group { size: 2, epoch: 1, payload, timeout: Duration::from_secs(60) };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let work = move |mut rank: Tcp| {
        let mut values = vec![1e-9; count];
        let times = (0..REPETITIONS).map(|_| {
            let began = Instant::now();
            rank.all_reduce_sum(&mut values).map(|()| began.elapsed())
        });
        times.collect::<Result<Vec<_>, _>>()
    };
    let other = thread::spawn(move || work(Tcp::connect(&address, 1, group)?));
    let times = work(Tcp::lead(&listener, group)?)?;
    other.join().expect("the other rank does not panic")?;
    Ok(median(times))
}

/// The same bytes there and back at once, by a thread for each direction and end, and nothing done with them.
fn floor(bytes: usize) -> std::io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let there = TcpStream::connect(listener.local_addr()?)?;
    let (here, _) = listener.accept()?;
    let mut times = Vec::new();
    let (mut sent, mut received) = (vec![vec![1; bytes]; 2], vec![vec![0; bytes]; 2]);
    for stream in [&there, &here] {
        stream.set_nodelay(true)?;
    }
    for _ in 0..REPETITIONS {
        let began = Instant::now();
        thread::scope(|scope| {
            for ((mut stream, sent), received) in
                [&there, &here].into_iter().zip(&mut sent).zip(&mut received)
            {
                scope.spawn(move || stream.write_all(sent));
                scope.spawn(move || stream.read_exact(received));
            }
        });
        times.push(began.elapsed());
    }
    Ok(median(times))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
