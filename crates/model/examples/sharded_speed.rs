//! Tokens per second of one model over several processes that talk over TCP on this machine, one thread each: ranks that
//! divide every layer (2), or stages that divide the layers (2/2: two ranks in two stages).
//!
//! `cargo run --release -p uniarm-model --example sharded_speed -- MODEL 1 2 2/2`

use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use uniarm_collective::{Group, Payload, Tcp};
use uniarm_model::{Forward, LlamaOptions, ModelError, OpenOptions, Part, Row, Shard};

/// Of a rank that this program starts: "rank size stages address".
const RANK: &str = "SHARDED_SPEED_RANK";
const TIMEOUT: Duration = Duration::from_secs(60);
const OPTIONS: LlamaOptions =
    LlamaOptions { threads: 1, kv_blocks: 256, block_tokens: 16, kv_at_once: false };

/// Decoded before time is taken, and then.
const WARM_STEPS: usize = 8;
const STEPS: usize = 48;

/// Tokens of a prompt, and how many are read.
const PROMPT_TOKENS: usize = 512;
const PROMPTS: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("wants MODEL and numbers of ranks")?;
    if let Ok(rank) = std::env::var(RANK) {
        return be_a_rank(&model, &rank);
    }
    for shape in arguments {
        let (size, stages) = shape.split_once('/').unwrap_or((&shape, "1"));
        measure(&model, size.parse()?, stages.parse()?)?;
    }
    Ok(())
}

fn load(model: &str, part: Part) -> Result<Shard, ModelError> {
    Shard::load(&uniarm_model::open(model, &OpenOptions::default())?, &OPTIONS, part)
}

fn group(size: usize) -> Group {
    Group { size, epoch: 0, payload: Payload::F32, timeout: TIMEOUT }
}

fn be_a_rank(model: &str, seat: &str) -> Result<(), Box<dyn std::error::Error>> {
    let [rank, size, stages, address] = seat.split(' ').collect::<Vec<_>>()[..] else {
        return Err(RANK.into());
    };
    let (rank, size) = (rank.parse()?, size.parse()?);
    let mut shard = load(model, Part { rank, size, stages: stages.parse()? })?;
    shard.join(Box::new(Tcp::connect(address, rank, group(size))?))?;
    // The leader is done.
    shard.follow(&[]);
    Ok(())
}

fn measure(model: &str, size: usize, stages: usize) -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let program = std::env::current_exe()?;
    let start = |rank| {
        Command::new(&program).arg(model).env(RANK, format!("{rank} {size} {stages} {address}")).spawn()
    };
    let mut others: Vec<Child> = (1..size).map(start).collect::<Result<_, _>>()?;
    let mut shard = load(model, Part { rank: 0, size, stages })?;
    shard.join(Box::new(Tcp::lead(&listener, group(size))?))?;
    let mut leader = shard.lead(|_| {});
    for rows in [1, 8] {
        println!("{size} ranks, {stages} stages, {rows} rows: {:.1} tokens/s", decode(&mut leader, rows)?);
    }
    println!("{size} ranks, {stages} stages, prompts: {:.1} tokens/s", read(&mut leader)?);
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

/// Tokens per second of prompts, read one after the other.
fn read(model: &mut dyn Forward) -> Result<f64, ModelError> {
    let tokens: Vec<u32> = (0..PROMPT_TOKENS as u32).collect();
    let blocks: Vec<u32> = (0..(PROMPT_TOKENS / OPTIONS.block_tokens) as u32).collect();
    let row =
        Row { tokens: &tokens, start: 0, blocks: &blocks, logits_from: PROMPT_TOKENS - 1, adapter: None };
    let mut logits = Vec::new();
    model.forward(&[row], &mut logits)?;
    let began = Instant::now();
    for _ in 0..PROMPTS {
        model.forward(&[row], &mut logits)?;
    }
    Ok((PROMPTS * PROMPT_TOKENS) as f64 / began.elapsed().as_secs_f64())
}
