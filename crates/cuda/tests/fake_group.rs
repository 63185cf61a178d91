//! Ranks of a group on GPUs, without any: threads over a libcuda that runs the kernels on the CPU, and a libnccl that copies
//! between them.
//!
//! The program builds both libraries and starts itself again where the loader finds them; without a test harness, so that what
//! the libraries count is one test's alone.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use uniarm_collective::{Collective, Fault, Faulty, Group, Local, Nccl, Payload, Schedule, Tcp};
use uniarm_cuda::{CudaLlama, CudaOptions, WeightFormat};
use uniarm_engine::likeliest::rank;
use uniarm_model::{
    Adapter, Conditioned, Forward, Likeliest, Lists, LlamaOptions, ModelError, ModelFiles, NoiseAt,
    OpenOptions, Part, Row, Shard, open,
};

#[path = "support/fakes.rs"]
mod fakes;
#[path = "support/made_up.rs"]
mod made_up;

use made_up::{LLAMA, QWEN2, VOCABULARY};

/// Set in the process that finds the libraries.
const FAKE: &str = "UNIARM_TEST_FAKE_GROUP";

/// Long enough for a machine that is in use besides.
const TIMEOUT: Duration = Duration::from_secs(120);

const BLOCK_TOKENS: usize = 16;
const CACHE_BLOCKS: usize = 32;

/// Bytes of a message's first piece over NCCL: what an order to a follower copies to the host.
const ORDER_BYTES: u64 = 32 + (16 << 10);

fn main() {
    let tests: [(&str, fn()); 9] = [
        ("any number of ranks has the bits of one gpu", any_number_of_ranks_has_the_bits_of_one_gpu),
        ("any number of ranks has the lists of one gpu", any_number_of_ranks_has_the_lists_of_one_gpu),
        ("followers keep their rows and count anew", followers_keep_their_rows_and_count_anew),
        ("a step copies orders and logits alone", a_step_copies_orders_and_logits_alone),
        ("a step of lists copies no logits", a_step_of_lists_copies_no_logits),
        ("a rank that is lost at any call ends the step", a_rank_that_is_lost_at_any_call_ends_the_step),
        ("a rank that hangs is named at the timeout", a_rank_that_hangs_is_named_at_the_timeout),
        ("ranks that cannot be are refused", ranks_that_cannot_be_are_refused),
        ("the demo model has the bits of one gpu", the_demo_model_has_the_bits_of_one_gpu),
    ];
    fakes::run(FAKE, "groups of GPUs", &tests);
}

fn options(weights: WeightFormat) -> CudaOptions {
    CudaOptions { device: 0, kv_blocks: CACHE_BLOCKS, block_tokens: BLOCK_TOKENS, weights, graphs: true }
}

fn group(size: usize, timeout: Duration) -> Group {
    Group { size, epoch: 1, payload: Payload::F32, timeout }
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn load(files: &ModelFiles, weights: WeightFormat, part: Part) -> Shard {
    Shard::over(Box::new(CudaLlama::load_part(files, &options(weights), part).unwrap())).ranked_by(rank)
}

/// Joins as processes do: over TCP first, and then over NCCL.
fn join(
    shard: &mut Shard,
    (address, rank): (&str, usize),
    group: Group,
    schedule: Option<Schedule>,
) -> Result<(), ModelError> {
    let mut met = Tcp::connect(address, rank, group)?;
    shard.agree(&mut met)?;
    let nccl: Box<dyn Collective> = Box::new(Nccl::over(met, 0)?);
    shard.join(match schedule {
        None => nccl,
        Some(schedule) => Box::new(Faulty::new(nccl, group.timeout, schedule)),
    })
}

/// Runs `lead` at rank 0 of a group of parts; returns what it says, and why each follower ended. Things happen to rank 1.
fn among<T>(
    shards: &mut [Shard],
    (group, fault): (Group, Option<Schedule>),
    adapters: &[Arc<Adapter>],
    lead: impl FnOnce(&mut dyn Forward) -> T,
    files: (&ModelFiles, WeightFormat),
) -> (T, Vec<String>) {
    let address = free_address();
    let size = shards.len() + 1;
    thread::scope(|scope| {
        let followers: Vec<_> = (1..)
            .zip(shards)
            .map(|(rank, shard)| {
                let (address, fault) = (address.clone(), fault.clone().filter(|_| rank == 1));
                scope.spawn(move || match join(shard, (&address, rank), group, fault) {
                    Ok(()) => shard.follow(adapters).to_string(),
                    Err(error) => error.to_string(),
                })
            })
            .collect();
        let mut shard = load(files.0, files.1, Part::from((0, size)));
        join(&mut shard, (&address, 0), group, None).unwrap();
        let mut leader = shard.lead(|_| {});
        let said = lead(&mut leader);
        drop(leader);
        (said, followers.into_iter().map(|follower| follower.join().unwrap()).collect())
    })
}

fn followers(files: &ModelFiles, weights: WeightFormat, size: usize) -> Vec<Shard> {
    (1..size).map(|rank| load(files, weights, Part::from((rank, size)))).collect()
}

fn adapters_of(conditioned: &[Conditioned]) -> Vec<Arc<Adapter>> {
    let mut seen = BTreeSet::new();
    let adapters = conditioned.iter().map(|conditioned| Arc::clone(conditioned.adapter()));
    adapters.filter(|adapter| seen.insert(adapter.fingerprint())).collect()
}

fn prompt(seed: u32, count: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7;
    (0..count as u32).map(|i| number(i) % VOCABULARY as u32).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Steps of prefill chunks and decode rows, with every kind of adapter and without: the logits of all of them.
fn script(model: &mut dyn Forward, adapters: &[Conditioned]) -> Vec<Vec<u32>> {
    let adapters = [None].into_iter().chain(adapters.iter().map(Some));
    let sequences: Vec<(Vec<u32>, [u32; 2], Option<&Conditioned>)> = (0..)
        .zip(adapters)
        .map(|(index, adapter)| (prompt(index, 24 - 2 * index as usize), [2 * index, 2 * index + 1], adapter))
        .collect();
    let row = |index: usize, from: usize, to: usize, wanted: usize| {
        let (tokens, blocks, adapter) = &sequences[index];
        let tokens = &tokens[from..to.min(tokens.len())];
        Row { tokens, start: from, blocks, logits_from: tokens.len() - wanted, adapter: *adapter }
    };
    let steps = [
        // One token alone: its rows need no placing.
        vec![row(0, 0, 1, 1)],
        // Chunks without logits, then with some; with and without adapters.
        vec![row(0, 1, 6, 0), row(1, 0, 9, 0)],
        vec![row(2, 0, 7, 2), row(1, 9, 99, 3), row(0, 6, 15, 0), row(3, 0, 11, 1)],
        vec![row(3, 11, 99, 1), row(4, 0, 16, 1), row(0, 15, 23, 0), row(2, 7, 99, 0)],
        // A decode row beside whole prompts that are there already, and one with an adapter alone.
        vec![row(0, 23, 24, 1)],
        vec![row(1, 21, 22, 1)],
    ];
    let mut all = Vec::new();
    for rows in &steps {
        let mut logits = vec![0.5];
        model.forward(rows, &mut logits).unwrap();
        assert_eq!(logits.len(), rows.iter().map(Row::wanted).sum::<usize>() * VOCABULARY);
        assert!(logits.iter().all(|logit| logit.is_finite()));
        all.push(bits(&logits));
    }
    all
}

fn any_number_of_ranks_has_the_bits_of_one_gpu() {
    for (shape, weights, sizes) in [(LLAMA, WeightFormat::F32, 1..=4), (QWEN2, WeightFormat::Bf16, 2..=3)] {
        let scene = shape.scene();
        let adapters = adapters_of(&scene.adapters);
        let mut whole = CudaLlama::load(&scene.files, &options(weights)).unwrap();
        let expected = script(&mut whole, &scene.adapters);
        for size in sizes {
            let mut shards = followers(&scene.files, weights, size);
            if size > 1 {
                let all: usize = shards.iter().map(Shard::weight_bytes).sum();
                assert!(all < whole.weight_bytes(), "{size} ranks: the followers hold {all} bytes");
            }
            let (found, ends) = among(
                &mut shards,
                (group(size, TIMEOUT), None),
                &adapters,
                |leader| script(leader, &scene.adapters),
                (&scene.files, weights),
            );
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "step {step} of {size} ranks, {weights:?}");
            }
            // The leader is gone, and that is all.
            assert!(ends.iter().all(|end| end.contains("rank 0 is gone")), "{ends:?}");
        }
    }
}

/// Of a step: rows that came whole, lists, and the rows behind these, the last one first.
type Listed = (Vec<u32>, Vec<Vec<[u32; 3]>>, Vec<u32>);

/// Steps of which some positions are listed, or all, or none.
fn listed_script(model: &mut dyn Forward, adapters: &[Conditioned]) -> Vec<Listed> {
    assert!(model.gives_lists());
    let noise = |position| Some(NoiseAt { seed: 1 << 40 | 3, choice: 1, position });
    let noisy = |position| Some(Likeliest { count: 5, scale: 0.9, noise: noise(position) });
    let long = Some(Likeliest { count: 60, scale: 1.7, noise: noise(7) });
    let greedy = Some(Likeliest { count: 9, scale: 1.0, noise: None });
    let (tokens, more) = (prompt(7, 12), prompt(8, 9));
    let row = |tokens, blocks, wanted: usize| {
        let logits_from = <[u32]>::len(tokens) - wanted;
        Row { tokens, start: 0, blocks, logits_from, adapter: None }
    };
    let (a, b, c) = (row(&tokens, &[0], 3), row(&more, &[1], 1), row(&tokens[3..], &[2], 2));
    let adapted = Row { adapter: Some(&adapters[1]), ..b };
    let steps = [
        (vec![a, adapted, c], vec![noisy(4), greedy, None]),
        // One position, whose row needs no placing; then as a row.
        (vec![b], vec![greedy]),
        (vec![b], vec![None]),
        (vec![a, b, c], vec![None, long, None]),
        (vec![c, a, adapted], vec![long, noisy(9), noisy(0)]),
    ];
    let of = |(rows, wanted): &(Vec<Row<'_>>, Vec<Option<Likeliest>>)| {
        let (mut logits, mut lists, mut behind) = (Vec::new(), Lists::default(), Vec::new());
        model.forward_listed((rows, wanted), (&mut logits, &mut lists)).unwrap();
        let count = lists.iter().count() as u64;
        let numbers: Vec<u64> = (lists.first..lists.first + count).rev().collect();
        model.listed_rows(&numbers, &mut behind).unwrap();
        let listed: Vec<Likeliest> = (rows.iter().zip(wanted))
            .flat_map(|(row, list)| (0..row.wanted()).filter_map(|offset| Some(list.as_ref()?.later(offset))))
            .collect();
        // They are what the CPU makes of the rows behind them.
        for ((list, wanted), row) in lists.iter().zip(listed).zip(behind.rchunks_exact(VOCABULARY)) {
            let (mut candidates, mut expected) = (Vec::new(), Lists::default());
            rank(&wanted, (row, 0), &mut candidates);
            expected.push(&wanted, VOCABULARY, candidates.into_iter());
            assert!(!list.is_empty() && expected.iter().next() == Some(list), "{wanted:?}");
        }
        let token = |token: &uniarm_model::Candidate| [token.rank.to_bits(), token.id, token.logit.to_bits()];
        let lists = lists.iter().map(|list| list.iter().map(token).collect()).collect();
        (bits(&logits), lists, bits(&behind))
    };
    steps.iter().map(of).collect()
}

fn any_number_of_ranks_has_the_lists_of_one_gpu() {
    for (shape, weights, sizes) in [(LLAMA, WeightFormat::F32, 1..=4), (QWEN2, WeightFormat::Bf16, 2..=3)] {
        let scene = shape.scene();
        let mut whole = CudaLlama::load(&scene.files, &options(weights)).unwrap();
        let expected = listed_script(&mut whole, &scene.adapters);
        for size in sizes {
            let (found, ends) = among(
                &mut followers(&scene.files, weights, size),
                (group(size, TIMEOUT), None),
                &adapters_of(&scene.adapters),
                |leader| listed_script(leader, &scene.adapters),
                (&scene.files, weights),
            );
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "step {step} of {size} ranks, {weights:?}");
            }
            assert!(ends.iter().all(|end| end.contains("rank 0 is gone")), "{ends:?}");
        }
    }
}

/// A follower has been in another group, and numbers its lists as a leader does who has not.
fn followers_keep_their_rows_and_count_anew() {
    let scene = LLAMA.scene();
    let files = (&scene.files, WeightFormat::F32);
    let mut shards = followers(files.0, files.1, 2);
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 1, adapter: None };
    let list = Some(Likeliest { count: 4, scale: 1.0, noise: None });
    let by_graph = fakes::count("fake_graph_launches");
    for _ in 0..2 {
        let lead = |leader: &mut dyn Forward| {
            let (mut logits, mut lists, mut behind) = (Vec::new(), Lists::default(), Vec::new());
            leader.forward(&[row], &mut logits).unwrap();
            for first in [0, 4] {
                leader.forward_listed((&[row], &[list]), (&mut Vec::new(), &mut lists)).unwrap();
                assert_eq!(lists.first, first);
            }
            let came = leader.listed_rows(&[6, 1], &mut behind).unwrap();
            assert_eq!(came, 2 * size_of::<f32>() * VOCABULARY.div_ceil(2), "from one other rank");
            let rows: Vec<&[f32]> = logits.chunks_exact(VOCABULARY).collect();
            assert!(behind == [rows[2], rows[1]].concat());
            let error = leader.listed_rows(&[8], &mut behind).unwrap_err();
            assert!(error.to_string().contains("not kept"), "{error}");
        };
        among(&mut shards, (group(2, TIMEOUT), None), &[], lead, files);
    }
    // A step that comes again is launched kernel by kernel: what ranks hand each other stands between.
    assert_eq!(fakes::count("fake_graph_launches"), by_graph);
}

fn a_step_of_lists_copies_no_logits() {
    const COUNT: usize = 6;
    let scene = LLAMA.scene();
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 3, adapter: None };
    let list = Some(Likeliest { count: COUNT, scale: 1.0, noise: None });
    let ((copied, gathered), _) = among(
        &mut followers(&scene.files, WeightFormat::F32, 3),
        (group(3, TIMEOUT), None),
        &[],
        |leader| {
            let mut lists = Lists::default();
            leader.forward(&[row], &mut Vec::new()).unwrap();
            let before = fakes::count("fake_bytes_to_host");
            leader.forward_listed((&[row], &[list]), (&mut Vec::new(), &mut lists)).unwrap();
            (fakes::count("fake_bytes_to_host") - before, lists.gathered_bytes)
        },
        (&scene.files, WeightFormat::F32),
    );
    // Each rank's list comes from its device, and from the other ranks in a message.
    let list_bytes = 2 * COUNT * 3 * size_of::<u32>();
    assert_eq!(copied, 2 * ORDER_BYTES + (3 * list_bytes) as u64 + 2 * ORDER_BYTES);
    assert_eq!(gathered, 2 * (list_bytes + 2 * size_of::<u32>()));
}

fn a_step_copies_orders_and_logits_alone() {
    let scene = LLAMA.scene();
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 3, adapter: None };
    let (copied, _) = among(
        &mut followers(&scene.files, WeightFormat::F32, 3),
        (group(3, TIMEOUT), None),
        &[],
        |leader| {
            // After a first step nobody still copies what ranks told each other when they joined.
            leader.forward(&[row], &mut Vec::new()).unwrap();
            let before = fakes::count("fake_bytes_to_host");
            leader.forward(&[row], &mut Vec::new()).unwrap();
            fakes::count("fake_bytes_to_host") - before
        },
        (&scene.files, WeightFormat::F32),
    );
    assert_eq!(copied, 2 * ORDER_BYTES + (2 * VOCABULARY * size_of::<f32>()) as u64);
}

/// Steps until one fails: how, and how long all of them took. With a list, the row behind it is asked for after each.
fn until_it_fails(leader: &mut dyn Forward, list: Option<Likeliest>) -> (String, Duration) {
    let tokens = prompt(5, 3);
    let began = Instant::now();
    let mut step = |start| {
        let row = Row { tokens: &tokens, start, blocks: &[0], logits_from: 2, adapter: None };
        let (mut logits, mut lists) = (Vec::new(), Lists::default());
        leader.forward_listed((&[row], &[list]), (&mut logits, &mut lists))?;
        match list {
            None => Ok(0),
            Some(_) => leader.listed_rows(&[lists.first], &mut logits),
        }
    };
    for start in [0, 3, 6] {
        if let Err(error) = step(start) {
            let again = step(start).unwrap_err();
            assert_eq!(again.to_string(), error.to_string(), "the group is over");
            return (error.to_string(), began.elapsed());
        }
    }
    panic!("no step failed")
}

/// Calls of rank 1 until a step is done, joining included: what ranks agree on, what a former group left, the order,
/// embeddings, four gathers for each of two layers, logits, and the wait for all of them; in place of logits a list behind
/// that, the next order, and the row.
const CALLS: u64 = 3 + 1 + 4 * 2 + 1 + 1;
const CALLS_OF_A_LIST: u64 = CALLS + 2;

fn a_rank_that_is_lost_at_any_call_ends_the_step() {
    let scene = LLAMA.scene();
    let files = (&scene.files, WeightFormat::F32);
    let mut shards = followers(files.0, files.1, 3);
    let list = Some(Likeliest { count: 4, scale: 1.0, noise: None });
    let calls = (2..=CALLS).map(|call| (call, None)).chain((2..=CALLS_OF_A_LIST).map(|call| (call, list)));
    for (call, list) in calls {
        for fault in [Fault::Abort, Fault::Death] {
            let schedule = Schedule::once(call, fault);
            let fails = |leader: &mut dyn Forward| until_it_fails(leader, list);
            let ((error, took), ends) =
                among(&mut shards, (group(3, TIMEOUT), Some(schedule)), &[], fails, files);
            assert!(error.contains("rank 1"), "{fault:?} at call {call}: {error}, {ends:?}");
            assert!(took < TIMEOUT / 2, "{fault:?} at call {call}: {took:?}");
        }
    }
    // Followers have kept their weights, and go on in the next group.
    let mut whole = CudaLlama::load(files.0, &options(files.1)).unwrap();
    let expected = script(&mut whole, &scene.adapters);
    let adapters = adapters_of(&scene.adapters);
    let (found, _) = among(
        &mut shards,
        (group(3, TIMEOUT), None),
        &adapters,
        |leader| script(leader, &scene.adapters),
        files,
    );
    assert!(found == expected);
}

fn a_rank_that_hangs_is_named_at_the_timeout() {
    let scene = LLAMA.scene();
    let files = (&scene.files, WeightFormat::F32);
    let timeout = Duration::from_secs(8);
    let mut shards = followers(files.0, files.1, 3);
    // In an order, in the midst of a step, and at its end.
    for call in [2, 6, CALLS - 1] {
        let schedule = Schedule::once(call, Fault::Silence);
        let fails = |leader: &mut dyn Forward| until_it_fails(leader, None);
        let ((error, took), ends) =
            among(&mut shards, (group(3, timeout), Some(schedule)), &[], fails, files);
        assert!(error.contains("rank 1"), "at call {call}: {error}, {ends:?}");
        assert!(took < 3 * timeout, "at call {call}: {took:?}");
    }
}

fn ranks_that_cannot_be_are_refused() {
    let scene = LLAMA.scene();
    let load = |part: Part| {
        let refused = CudaLlama::load_part(&scene.files, &options(WeightFormat::F32), part);
        refused.err().expect("no such part").to_string()
    };
    let stages = load(Part { rank: 0, size: 2, stages: 2 });
    assert!(stages.contains("stages are for CPUs"), "{stages}");
    assert!(load(Part::from((0, 5))).contains("5 ranks share this model's 4"));

    let two = group(2, TIMEOUT);
    let part = |rank| Part::from((rank, 2));
    let mut lonely = CudaLlama::load_part(&scene.files, &options(WeightFormat::F32), part(1)).unwrap();
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
    let error = lonely.forward(&[row], &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("has joined none"), "{error}");

    let on_cpu = || {
        let options = LlamaOptions { threads: 1, kv_blocks: CACHE_BLOCKS, block_tokens: BLOCK_TOKENS };
        Shard::load(&scene.files, &options, part(0)).unwrap()
    };
    let on_gpu = |rank, weights| self::load(&scene.files, weights, part(rank));
    let pairs = [
        (on_cpu(), on_gpu(1, WeightFormat::F32), "weights of f32, and rank 0 on a CPU"),
        (
            on_gpu(0, WeightFormat::F32),
            on_gpu(1, WeightFormat::Bf16),
            "weights of bf16, and rank 0 on a GPU with weights of f32",
        ),
        // Two GPUs that have no way to each other.
        (on_gpu(0, WeightFormat::F32), on_gpu(1, WeightFormat::F32), "no way between their devices"),
    ];
    for (one, other, sentence) in pairs {
        let ranks = Local::group(two).unwrap();
        let errors: Vec<String> = thread::scope(|scope| {
            let threads: Vec<_> = [one, other]
                .into_iter()
                .zip(ranks)
                .map(|(mut shard, rank)| scope.spawn(move || shard.join(Box::new(rank)).unwrap_err()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap().to_string()).collect()
        });
        assert!(errors.iter().all(|error| error.contains(sentence)), "{errors:?}");
    }
}

/// Its thirty layers are more than a stream takes at once.
fn the_demo_model_has_the_bits_of_one_gpu() {
    let Ok(path) = std::env::var("UNIARM_DEMO_MODEL") else {
        return println!("skipped: no demo model (UNIARM_DEMO_MODEL)");
    };
    let files = open(&path, &OpenOptions::default()).unwrap();
    let step = |model: &mut dyn Forward| {
        let mut logits = Vec::new();
        let row = Row { tokens: &[1, 4093], start: 0, blocks: &[3], logits_from: 1, adapter: None };
        model.forward(&[row], &mut logits).unwrap();
        bits(&logits)
    };
    let weights = WeightFormat::Bf16;
    let expected = step(&mut CudaLlama::load(&files, &options(weights)).unwrap());
    let (found, _) =
        among(&mut followers(&files, weights, 2), (group(2, TIMEOUT), None), &[], step, (&files, weights));
    assert!(found == expected);
}
