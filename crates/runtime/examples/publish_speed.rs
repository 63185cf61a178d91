//! What writing a step down costs its engine: alone, and while others read as fast as they can.
//!
//! `cargo run --release -p uniarm-runtime --example publish_speed`

use std::{
    hint::black_box,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use uniarm_runtime::steps::{STEPS_KEPT, Step, Steps};

const PUBLICATIONS: u32 = 2_000_000;
const REPETITIONS: usize = 5;

fn main() {
    println!("alone:         {:.1} ns a step", nanoseconds(&Steps::new("base")));
    let (steps, is_over) = (Steps::new("base"), AtomicBool::new(false));
    let (read, busy) = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut read = 0;
            while !is_over.load(Ordering::Relaxed) {
                read += black_box(steps.last(STEPS_KEPT)).len();
            }
            read
        });
        let busy = nanoseconds(&steps);
        is_over.store(true, Ordering::Relaxed);
        (reader.join().expect("a reader does not panic"), busy)
    });
    println!("with a reader: {busy:.1} ns a step ({read} steps were read)");
}

/// Of one publication, the fastest of some runs.
fn nanoseconds(steps: &Steps) -> f64 {
    let ended = Instant::now();
    let run = || {
        let began = Instant::now();
        for number in 0..PUBLICATIONS {
            steps.publish(ended, black_box(Step { forward_us: u64::from(number), ..Step::default() }));
        }
        began.elapsed().as_secs_f64() * 1e9 / f64::from(PUBLICATIONS)
    };
    (0..REPETITIONS).map(|_| run()).fold(f64::INFINITY, f64::min)
}
