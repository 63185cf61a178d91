//! How long a plan and its commit take, against a step that takes milliseconds: `cargo run --release --example
//! plan_speed`.

use std::time::{Duration, Instant};

use uniarm_decode::blocks::CacheRoot;
use uniarm_decode::scheduler::{NewSequence, Priority, Scheduler, SchedulerOptions, SequenceId, Tenant};

const STEPS: usize = 1000;

fn main() {
    println!("{:<58} {:>12} {:>12}", "median of 1000 steps", "plan", "commit");
    for (running, context) in [(16, 1024), (64, 1024), (256, 1024), (256, 8192)] {
        let mut scheduler = answering(running, context);
        report(&format!("{running} answers over {context} tokens"), &mut scheduler);
    }
    let mut scheduler = answering(256, 1024);
    for id in 0..1000 {
        // There is no room for it: every plan looks at the head of the line, finds its prefix and leaves it there.
        let mut new = sequence(10_000 + id, 1024);
        new.tokens = sequence(0, 1024).tokens;
        new.tokens.extend(0..(scheduler.options().blocks as u32 - 65) * 16);
        new.logits_from = new.tokens.len() - 1;
        new.tokens_max = new.tokens.len();
        scheduler.add(Duration::ZERO, new).expect("the line is long enough");
    }
    report("256 answers over 1024 tokens, 1000 prompts without room", &mut scheduler);
}

fn sequence(id: u64, tokens: u32) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        tokens: (0..tokens).map(|index| index ^ (id as u32) << 20).collect(),
        logits_from: tokens as usize - 1,
        tokens_max: tokens as usize + 2 * STEPS,
        root: CacheRoot(0),
        priority: Priority::Normal,
        tenant: Tenant(0),
        deadline: Some(Duration::from_secs(3600)),
    }
}

/// A scheduler whose sequences all have one pending token in every step.
fn answering(running: u64, context: u32) -> Scheduler {
    let blocks = (running as usize + 1) * (context as usize / 16 + STEPS / 16 + 4);
    let options =
        SchedulerOptions { blocks: blocks.max(64 * 1024 / 16), running_max: 512, ..Default::default() };
    let mut scheduler =
        Scheduler::new(SchedulerOptions { step_tokens: 1 << 16, prefill_chunk: 1 << 13, ..options });
    for id in 0..running {
        scheduler.add(Duration::ZERO, sequence(id, context)).expect("the pool is large enough");
    }
    while advance(&mut scheduler).0 < running as usize {}
    scheduler
}

/// One step; how long its plan and its commit took.
fn advance(scheduler: &mut Scheduler) -> (usize, [Duration; 2]) {
    let start = Instant::now();
    let plan = scheduler.plan(Duration::ZERO);
    let planned = start.elapsed();
    scheduler.commit(&plan);
    let committed = start.elapsed() - planned;
    for row in plan.rows.iter().filter(|row| row.logits_from < row.tokens.len()) {
        scheduler.extend(row.sequence, &[1]).expect("the sequence may grow");
    }
    (plan.rows.len(), [planned, committed])
}

fn report(name: &str, scheduler: &mut Scheduler) {
    let steps: Vec<_> = (0..STEPS).map(|_| advance(scheduler).1).collect();
    let [plan, commit] = [0, 1].map(|part| {
        let mut times: Vec<_> = steps.iter().map(|times| times[part]).collect();
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    });
    println!("{name:<58} {plan:>9.1} µs {commit:>9.1} µs");
}
