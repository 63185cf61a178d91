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

use made_up::{LLAMA, QWEN2, Shape, VOCABULARY};

/// Stages and ranks of groups.
type Groups = &'static [(usize, usize)];

/// Those whose bits are compared with those of one GPU.
const GROUPS: [(Shape, WeightFormat, Groups); 2] = [
    (LLAMA, WeightFormat::F32, &[(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 4)]),
    (QWEN2, WeightFormat::Bf16, &[(1, 2), (1, 3), (2, 2)]),
];

/// Layers that neither two stages nor three divide evenly, and more than are in flight at once, over the micro-batches of a step.
const DEEP: Shape = Shape { layers: 11, ..LLAMA };

/// Set in the process that finds the libraries.
const FAKE: &str = "UNIARM_TEST_FAKE_GROUP";

/// Long enough for a machine that is in use besides.
const TIMEOUT: Duration = Duration::from_secs(120);

const BLOCK_TOKENS: usize = 16;
const CACHE_BLOCKS: usize = 32;

/// Bytes of a message's first piece over NCCL: what an order to a follower copies to the host.
const ORDER_BYTES: u64 = 32 + (16 << 10);

fn main() {
    let tests: [(&str, fn()); 12] = [
        ("any number of ranks has the bits of one gpu", any_number_of_ranks_has_the_bits_of_one_gpu),
        ("any number of ranks has the lists of one gpu", any_number_of_ranks_has_the_lists_of_one_gpu),
        (
            "stages in micro-batches have the bits of one gpu",
            stages_in_micro_batches_have_the_bits_of_one_gpu,
        ),
        ("ranks share the memory of one gpu", ranks_share_the_memory_of_one_gpu),
        ("followers keep their rows and count anew", followers_keep_their_rows_and_count_anew),
        ("a step copies orders and logits alone", a_step_copies_orders_and_logits_alone),
        ("a step of lists copies no logits", a_step_of_lists_copies_no_logits),
        ("a rank that is lost at any call ends the step", a_rank_that_is_lost_at_any_call_ends_the_step),
        ("a stage that is lost at any call ends the step", a_stage_that_is_lost_at_any_call_ends_the_step),
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

/// What the ranks of a group hold together.
#[derive(Clone, Copy)]
struct Held<'a> {
    files: &'a ModelFiles,
    weights: WeightFormat,
    stages: usize,
}

impl Held<'_> {
    fn whole(self) -> CudaLlama {
        CudaLlama::load(self.files, &options(self.weights)).unwrap()
    }

    fn shard(self, number: usize, size: usize) -> Shard {
        let part = Part { rank: number, size, stages: self.stages };
        let model = CudaLlama::load_part(self.files, &options(self.weights), part).unwrap();
        Shard::over(Box::new(model)).ranked_by(rank)
    }

    fn followers(self, size: usize) -> Vec<Shard> {
        (1..size).map(|number| self.shard(number, size)).collect()
    }
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

/// Runs `lead` at rank 0 of a group of parts; returns what it says, and why each follower ended. Things happen to the rank that is
/// named with them.
fn among<T>(
    shards: &mut [Shard],
    (group, fault): (Group, Option<(usize, Schedule)>),
    adapters: &[Arc<Adapter>],
    lead: impl FnOnce(&mut dyn Forward) -> T,
    held: Held<'_>,
) -> (T, Vec<String>) {
    let address = free_address();
    let size = shards.len() + 1;
    thread::scope(|scope| {
        let followers: Vec<_> = (1..)
            .zip(shards)
            .map(|(rank, shard)| {
                let fault =
                    fault.clone().filter(|(unlucky, _)| *unlucky == rank).map(|(_, schedule)| schedule);
                let address = address.clone();
                scope.spawn(move || match join(shard, (&address, rank), group, fault) {
                    Ok(()) => shard.follow(adapters).to_string(),
                    Err(error) => error.to_string(),
                })
            })
            .collect();
        let mut shard = held.shard(0, size);
        join(&mut shard, (&address, 0), group, None).unwrap();
        let mut leader = shard.lead(|_| {});
        let said = lead(&mut leader);
        drop(leader);
        (said, followers.into_iter().map(|follower| follower.join().unwrap()).collect())
    })
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
    for (shape, weights, groups) in GROUPS {
        let scene = shape.scene();
        let adapters = adapters_of(&scene.adapters);
        let held = Held { files: &scene.files, weights, stages: 1 };
        let expected = script(&mut held.whole(), &scene.adapters);
        for (stages, size) in groups.iter().copied() {
            let held = Held { stages, ..held };
            let (found, ends) = among(
                &mut held.followers(size),
                (group(size, TIMEOUT), None),
                &adapters,
                |leader| script(leader, &scene.adapters),
                held,
            );
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "step {step} of {size} ranks in {stages} stages, {weights:?}");
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
    listed(model, &steps)
}

/// A step that passes through stages in micro-batches, of which rows are cut in the middle, rows and lists wanted of one batch, and of
/// one after the other; and a step behind it that is too short for that.
fn long_script(model: &mut dyn Forward, adapters: &[Conditioned]) -> Vec<Listed> {
    let noise = Some(NoiseAt { seed: 5, choice: 0, position: 30 });
    let list = Some(Likeliest { count: 5, scale: 0.9, noise });
    let prompts = [(11, 80), (12, 90), (13, 101)].map(|(seed, count)| prompt(seed, count));
    let blocks: [Vec<u32>; 3] = [0..5, 5..11, 11..18].map(Vec::from_iter);
    let row = |index: usize, from: usize, to: usize, wanted: usize| Row {
        tokens: &prompts[index][from..to],
        start: from,
        blocks: &blocks[index],
        logits_from: to - from - wanted,
        adapter: [None, Some(&adapters[1]), Some(&adapters[3])][index],
    };
    let steps = [
        (vec![row(0, 0, 79, 70), row(1, 0, 90, 60), row(2, 0, 100, 40)], vec![None, list, None]),
        (vec![row(2, 100, 101, 1), row(0, 79, 80, 1)], vec![list, None]),
    ];
    listed(model, &steps)
}

fn listed(model: &mut dyn Forward, steps: &[(Vec<Row<'_>>, Vec<Option<Likeliest>>)]) -> Vec<Listed> {
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
    for (shape, weights, groups) in GROUPS {
        let scene = shape.scene();
        let held = Held { files: &scene.files, weights, stages: 1 };
        let expected = listed_script(&mut held.whole(), &scene.adapters);
        for (stages, size) in groups.iter().copied() {
            let held = Held { stages, ..held };
            let (found, ends) = among(
                &mut held.followers(size),
                (group(size, TIMEOUT), None),
                &adapters_of(&scene.adapters),
                |leader| listed_script(leader, &scene.adapters),
                held,
            );
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "step {step} of {size} ranks in {stages} stages, {weights:?}");
            }
            assert!(ends.iter().all(|end| end.contains("rank 0 is gone")), "{ends:?}");
        }
    }
}

fn stages_in_micro_batches_have_the_bits_of_one_gpu() {
    let scene = DEEP.scene();
    let held = Held { files: &scene.files, weights: WeightFormat::F32, stages: 1 };
    let expected = long_script(&mut held.whole(), &scene.adapters);
    for (stages, size) in [(2, 2), (3, 6)] {
        let held = Held { stages, ..held };
        let (found, ends) = among(
            &mut held.followers(size),
            (group(size, TIMEOUT), None),
            &adapters_of(&scene.adapters),
            |leader| long_script(leader, &scene.adapters),
            held,
        );
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(found == expected, "step {step} of {size} ranks in {stages} stages");
        }
        assert!(ends.iter().all(|end| end.contains("rank 0 is gone")), "{ends:?}");
    }
}

/// To the byte: what one GPU has, ranks have once, but for angles and norms, and embeddings that are the output projection too.
fn ranks_share_the_memory_of_one_gpu() {
    let shapes: [(_, Groups); 2] = [(DEEP, &[(1, 2), (2, 2), (2, 4), (3, 6)]), (QWEN2, &[(2, 2)])];
    for (shape, groups) in shapes {
        let scene = shape.scene();
        let load = |part: Part| {
            let before = fakes::count("fake_allocated_bytes");
            let model = CudaLlama::load_part(&scene.files, &options(WeightFormat::F32), part).unwrap();
            let bytes = fakes::count("fake_allocated_bytes") - before;
            [bytes, model.weight_bytes() as u64, model.block_bytes() as u64]
        };
        let whole = load(Part::WHOLE);
        for (stages, size) in groups.iter().copied() {
            let parts: Vec<[u64; 3]> = (0..size).map(|rank| load(Part { rank, size, stages })).collect();
            let [bytes, weights, blocks] =
                [0, 1, 2].map(|kind| parts.iter().map(|part| part[kind]).sum::<u64>());
            let ranks = size / stages;
            let angles = CACHE_BLOCKS * BLOCK_TOKENS * shape.head_dim;
            let norms = shape.hidden * (size - 1 + 2 * shape.layers * (ranks - 1));
            // A ring of no rows takes a number.
            let rings = size - ranks;
            let tied = if shape.qwen2 || stages == 1 { 0 } else { VOCABULARY * shape.hidden };
            let numbers = |count: usize| (count * size_of::<f32>()) as u64;
            let what = format!("{stages} stages of {size} ranks: {parts:?}, and one GPU {whole:?}");
            assert_eq!(weights, whole[1] + numbers(tied), "{what}");
            assert_eq!(blocks, whole[2], "{what}");
            assert_eq!(bytes, whole[0] + numbers(tied + angles * (size - 1) + norms + rings), "{what}");
        }
    }
}

/// A follower has been in another group, and numbers its lists as a leader does who has not.
fn followers_keep_their_rows_and_count_anew() {
    let scene = LLAMA.scene();
    // What comes of a row: one other rank has half of it, or all.
    for (stages, bytes) in
        [(1, size_of::<f32>() * VOCABULARY.div_ceil(2)), (2, size_of::<f32>() * VOCABULARY)]
    {
        keep_rows_and_count_anew(Held { files: &scene.files, weights: WeightFormat::F32, stages }, bytes);
    }
}

fn keep_rows_and_count_anew(held: Held<'_>, bytes: usize) {
    let mut shards = held.followers(2);
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
            assert_eq!(came, 2 * bytes, "of two rows");
            let rows: Vec<&[f32]> = logits.chunks_exact(VOCABULARY).collect();
            assert!(behind == [rows[2], rows[1]].concat());
            let error = leader.listed_rows(&[8], &mut behind).unwrap_err();
            assert!(error.to_string().contains("not kept"), "{error}");
        };
        among(&mut shards, (group(2, TIMEOUT), None), &[], lead, held);
    }
    // A step that comes again is launched kernel by kernel: what ranks hand each other stands between.
    assert_eq!(fakes::count("fake_graph_launches"), by_graph);
}

/// Stages and ranks of groups whose copies are counted.
const COUNTED: [(usize, usize); 3] = [(1, 3), (2, 2), (2, 4)];

fn a_step_of_lists_copies_no_logits() {
    const COUNT: usize = 6;
    let scene = LLAMA.scene();
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 3, adapter: None };
    let list = Some(Likeliest { count: COUNT, scale: 1.0, noise: None });
    for (stages, size) in COUNTED {
        let held = Held { files: &scene.files, weights: WeightFormat::F32, stages };
        let ((copied, gathered), _) = among(
            &mut held.followers(size),
            (group(size, TIMEOUT), None),
            &[],
            |leader| {
                let mut lists = Lists::default();
                leader.forward(&[row], &mut Vec::new()).unwrap();
                let before = fakes::count("fake_bytes_to_host");
                leader.forward_listed((&[row], &[list]), (&mut Vec::new(), &mut lists)).unwrap();
                (fakes::count("fake_bytes_to_host") - before, lists.gathered_bytes)
            },
            held,
        );
        // Lists come from the devices of the last stage, and but for that of rank 0 in a message.
        let list_bytes = 2 * COUNT * 3 * size_of::<u32>();
        let makers = size / stages;
        let messages = if stages == 1 { makers - 1 } else { makers };
        let orders = (size - 1 + messages) as u64 * ORDER_BYTES;
        assert_eq!(copied, orders + (makers * list_bytes) as u64, "{stages} stages of {size} ranks");
        assert_eq!(gathered, messages * (list_bytes + 2 * size_of::<u32>()));
    }
}

fn a_step_copies_orders_and_logits_alone() {
    let scene = LLAMA.scene();
    let tokens = prompt(3, 5);
    let row = Row { tokens: &tokens, start: 0, blocks: &[0], logits_from: 3, adapter: None };
    for (stages, size) in COUNTED {
        let held = Held { files: &scene.files, weights: WeightFormat::F32, stages };
        let (copied, _) = among(
            &mut held.followers(size),
            (group(size, TIMEOUT), None),
            &[],
            |leader| {
                // After a first step nobody still copies what ranks told each other when they joined.
                leader.forward(&[row], &mut Vec::new()).unwrap();
                let before = fakes::count("fake_bytes_to_host");
                leader.forward(&[row], &mut Vec::new()).unwrap();
                fakes::count("fake_bytes_to_host") - before
            },
            held,
        );
        let logits = (2 * VOCABULARY * size_of::<f32>()) as u64;
        assert_eq!(copied, (size - 1) as u64 * ORDER_BYTES + logits, "{stages} stages of {size} ranks");
    }
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

/// Calls of a rank until a step is done, joining included: what ranks agree on, what a former group left, the order,
/// embeddings, four gathers for each of two layers, logits, and the wait for all of them; in place of logits a list behind
/// that, the next order, and the row.
const CALLS: u64 = 3 + 1 + 4 * 2 + 1 + 1;
const CALLS_OF_A_LIST: u64 = CALLS + 2;

/// The same of a rank of two stages, each of a layer: embeddings, or what comes from the stage before, and a gather of that; and
/// in the first stage what goes to the next one.
const CALLS_OF_A_STAGE: u64 = 3 + 2 + 4 + 1 + 1;
const CALLS_OF_A_STAGE_WITH_A_LIST: u64 = CALLS_OF_A_STAGE + 2;

fn a_rank_that_is_lost_at_any_call_ends_the_step() {
    let scene = LLAMA.scene();
    let held = Held { files: &scene.files, weights: WeightFormat::F32, stages: 1 };
    lose_at_any_call(held, (3, 1), (CALLS, CALLS_OF_A_LIST), &scene.adapters);
}

fn a_stage_that_is_lost_at_any_call_ends_the_step() {
    let scene = LLAMA.scene();
    let held = Held { files: &scene.files, weights: WeightFormat::F32, stages: 2 };
    for unlucky in [1, 3] {
        let calls = (CALLS_OF_A_STAGE, CALLS_OF_A_STAGE_WITH_A_LIST);
        lose_at_any_call(held, (4, unlucky), calls, &scene.adapters);
    }
}

fn lose_at_any_call(
    held: Held<'_>,
    (size, unlucky): (usize, usize),
    (calls, calls_of_a_list): (u64, u64),
    conditioned: &[Conditioned],
) {
    let mut shards = held.followers(size);
    // A rank that ended because of the lost one may be heard of first.
    let named = 1..size;
    let list = Some(Likeliest { count: 4, scale: 1.0, noise: None });
    let calls = (2..=calls).map(|call| (call, None)).chain((2..=calls_of_a_list).map(|call| (call, list)));
    for (call, list) in calls {
        for fault in [Fault::Abort, Fault::Death] {
            let schedule = Schedule::once(call, fault);
            let fails = |leader: &mut dyn Forward| until_it_fails(leader, list);
            let fate = (group(size, TIMEOUT), Some((unlucky, schedule)));
            let ((error, took), ends) = among(&mut shards, fate, &[], fails, held);
            let what = format!("{fault:?} of rank {unlucky} at call {call}");
            let is_named = named.clone().any(|rank| error.contains(&format!("rank {rank}")));
            assert!(is_named, "{what}: {error}, {ends:?}");
            assert!(took < TIMEOUT / 2, "{what}: {took:?}");
        }
    }
    // Followers have kept their weights, and go on in the next group.
    let expected = script(&mut held.whole(), conditioned);
    let (found, _) = among(
        &mut shards,
        (group(size, TIMEOUT), None),
        &adapters_of(conditioned),
        |leader| script(leader, conditioned),
        held,
    );
    assert!(found == expected);
}

fn a_rank_that_hangs_is_named_at_the_timeout() {
    let scene = LLAMA.scene();
    let timeout = Duration::from_secs(4);
    // In an order, in the midst of a step, and at its end; of the last stage, before it takes over.
    let hangs = [(1, 3, 1, 2), (1, 3, 1, 6), (1, 3, 1, CALLS - 1), (2, 2, 1, 3)];
    for (stages, size, unlucky, call) in hangs {
        let held = Held { files: &scene.files, weights: WeightFormat::F32, stages };
        let schedule = Schedule::once(call, Fault::Silence);
        let fails = |leader: &mut dyn Forward| until_it_fails(leader, None);
        let fate = (group(size, timeout), Some((unlucky, schedule)));
        let ((error, took), ends) = among(&mut held.followers(size), fate, &[], fails, held);
        assert!(
            error.contains(&format!("rank {unlucky}")),
            "{stages} stages, call {call}: {error}, {ends:?}"
        );
        assert!(took < 3 * timeout, "{stages} stages, call {call}: {took:?}");
    }
}

fn ranks_that_cannot_be_are_refused() {
    let scene = LLAMA.scene();
    let load = |part: Part| {
        let refused = CudaLlama::load_part(&scene.files, &options(WeightFormat::F32), part);
        refused.err().expect("no such part").to_string()
    };
    assert!(load(Part { rank: 0, size: 3, stages: 2 }).contains("3 ranks are not a multiple of 2 stages"));
    assert!(load(Part { rank: 0, size: 3, stages: 3 }).contains("3 stages share this model's 2 layers"));
    assert!(load(Part::from((0, 5))).contains("5 ranks share this model's 4"));

    let two = group(2, TIMEOUT);
    let part = |rank| Part::from((rank, 2));
    let mut lonely = CudaLlama::load_part(&scene.files, &options(WeightFormat::F32), part(1)).unwrap();
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
    let error = lonely.forward(&[row], &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("has joined none"), "{error}");

    let on_cpu = || {
        let options = LlamaOptions {
            threads: 1,
            kv_blocks: CACHE_BLOCKS,
            block_tokens: BLOCK_TOKENS,
            ..LlamaOptions::default()
        };
        Shard::load(&scene.files, &options, part(0)).unwrap()
    };
    let on_gpu = |rank, weights| Held { files: &scene.files, weights, stages: 1 }.shard(rank, 2);
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
    let held = Held { files: &files, weights: WeightFormat::Bf16, stages: 1 };
    let expected = step(&mut held.whole());
    for stages in [1, 2] {
        let held = Held { stages, ..held };
        let (found, _) = among(&mut held.followers(2), (group(2, TIMEOUT), None), &[], step, held);
        assert!(found == expected, "{stages} stages");
    }
}
