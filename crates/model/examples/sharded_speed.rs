//! Tokens per second of one model over several processes that talk over TCP on this machine, one thread each.
//!
//! `cargo run --release -p uniarm-model --example sharded_speed -- MODEL 1 2`

use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use uniarm_collective::{Group, Payload, Tcp};
use uniarm_model::{Forward, LlamaOptions, ModelError, OpenOptions, Row, Shard};

/// Of a rank that this program starts: "rank size address".
const RANK: &str = "SHARDED_SPEED_RANK";
const TIMEOUT: Duration = Duration::from_secs(60);
const OPTIONS: LlamaOptions = LlamaOptions { threads: 1, kv_blocks: 256, block_tokens: 16 };

/// Decoded before time is taken, and then.
const WARM_STEPS: usize = 8;
const STEPS: usize = 48;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("wants MODEL and numbers of ranks")?;
    if let Ok(rank) = std::env::var(RANK) {
        return be_a_rank(&model, &rank);
    }
    for size in arguments {
        measure(&model, size.parse()?)?;
    }
    Ok(())
}

fn load(model: &str, part: (usize, usize)) -> Result<Shard, ModelError> {
    Shard::load(&uniarm_model::open(model, &OpenOptions::default())?, &OPTIONS, part)
}

fn group(size: usize) -> Group {
    Group { size, epoch: 0, payload: Payload::F32, timeout: TIMEOUT }
}

fn be_a_rank(model: &str, seat: &str) -> Result<(), Box<dyn std::error::Error>> {
    let [rank, size, address] = seat.split(' ').collect::<Vec<_>>()[..] else { return Err(RANK.into()) };
    let (rank, size) = (rank.parse()?, size.parse()?);
    let mut shard = load(model, (rank, size))?;
    shard.join(Box::new(Tcp::connect(address, rank, group(size))?))?;
    // The leader is done.
    shard.follow(&[]);
    Ok(())
}

fn measure(model: &str, size: usize) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let program = std::env::current_exe()?;
    let start =
        |rank| Command::new(&program).arg(model).env(RANK, format!("{rank} {size} {address}")).spawn();
    let mut others: Vec<Child> = (1..size).map(start).collect::<Result<_, _>>()?;
    let mut shard = load(model, (0, size))?;
    shard.join(Box::new(Tcp::lead(&listener, group(size))?))?;
    let mut leader = shard.lead(|_| {});
    for rows in [1, 8] {
        println!("{size} ranks, {rows} rows: {:.1} tokens/s", decode(&mut leader, rows)?);
    }
    drop(leader);
    for child in &mut others {
        child.wait()?;
    }
    Ok(())
}

/// Tokens per second of so many sequences that decode together.
fn decode(model: &mut dyn Forward, rows: usize) -> Result<f64, ModelError> {
    let mut logits = Vec::new();
    let tables: Vec<Vec<u32>> = (0..rows as u32).map(|row| (row * 8..row * 8 + 8).collect()).collect();
    let mut began = Instant::now();
    for step in 0..WARM_STEPS + STEPS {
        if step == WARM_STEPS {
            began = Instant::now();
        }
        let rows: Vec<Row<'_>> = tables
            .iter()
            .map(|blocks| Row { tokens: &[17], start: step, blocks, logits_from: 0, adapter: None })
            .collect();
        model.forward(&rows, &mut logits)?;
    }
    Ok((rows * STEPS) as f64 / began.elapsed().as_secs_f64())
}
