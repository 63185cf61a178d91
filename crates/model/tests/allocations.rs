//! A step asks the allocator for nothing, once a step as large has been taken.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use support::made_up;
use uniarm_model::{Forward as _, Llama, LlamaOptions, Row};

/// Counts what it is asked for, by all threads.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// Safety: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        unsafe { System.dealloc(place, layout) }
    }
}

/// Rounds of steps, of which one has to ask for nothing at all.
const ROUNDS: usize = 5;

/// One test alone in its process: others would be counted.
#[test]
fn a_step_asks_the_allocator_for_nothing() {
    for (files, adapters, _folder) in
        [made_up::scene("llama"), made_up::scene("qwen2"), made_up::quantised_scene()]
    {
        for threads in [1, 2] {
            let options =
                LlamaOptions { threads, kv_blocks: 32, block_tokens: 16, ..LlamaOptions::default() };
            let mut llama = Llama::load(&files, &options).expect("a sound model");
            let blocks: Vec<[u32; 3]> = (0..8).map(|row| [0, 1, 2].map(|block| 3 * row + block)).collect();
            let mut logits = Vec::new();
            let mut step = |start: usize, count: usize| {
                let rows: Vec<Row<'_>> = blocks[..count]
                    .iter()
                    .zip((0..).map(|index| adapters.get(index / 2).filter(|_| index % 2 == 1)))
                    .map(|(blocks, adapter)| Row { tokens: &[7], start, blocks, logits_from: 0, adapter })
                    .collect();
                let before = CALLS.load(Ordering::Relaxed);
                llama.forward(&rows, &mut logits).expect("sound rows");
                CALLS.load(Ordering::Relaxed) - before
            };
            step(0, 8);
            step(1, 1);
            // A thread's own workspace grows with its first task, whenever it gets one: on a busy machine in a later round.
            let mut round = || -> Vec<usize> {
                (2..40).map(|start| step(start, [8, 1, 5][start % 3])).filter(|calls| *calls > 0).collect()
            };
            let rounds: Vec<Vec<usize>> = (0..ROUNDS).map(|_| round()).collect();
            assert!(rounds.iter().any(Vec::is_empty), "{}, {threads} threads: {rounds:?}", files.name);
        }
    }
}
