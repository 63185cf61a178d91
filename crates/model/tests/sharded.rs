//! A sharded model is the model: the same logits, bit for bit, for any number of ranks, format and adapter; and a lost rank
//! ends the step of all others.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use support::{Sequence, bits, demo_model, made_up, shared};
use tempfile::TempDir;
use uniarm_collective::{Collective, Fault, Faulty, Group, Local, Payload, Schedule};
use uniarm_model::{
    Adapter, AdapterFiles, Candidate, Conditioned, Forward, Likeliest, Lists, Llama, LlamaOptions,
    ModelError, ModelFiles, NoiseAt, Part, Row, Shard,
};

const TIMEOUT: Duration = Duration::from_secs(60);
const BLOCKS: u32 = 5;

fn options(threads: usize) -> LlamaOptions {
    LlamaOptions { threads, kv_blocks: 64, block_tokens: 16, ..LlamaOptions::default() }
}

fn group(size: usize) -> Group {
    Group { size, epoch: 1, payload: Payload::F32, timeout: TIMEOUT }
}

fn adapters_of(conditioned: &[Conditioned]) -> Vec<Arc<Adapter>> {
    let mut adapters: Vec<Arc<Adapter>> = Vec::new();
    for one in conditioned {
        if !adapters.iter().any(|adapter| Arc::ptr_eq(adapter, one.adapter())) {
            adapters.push(Arc::clone(one.adapter()));
        }
    }
    adapters
}

/// Models of every format, tied and untied, with biases and without, and adapters of every kind.
fn scenes() -> Vec<(ModelFiles, Vec<Conditioned>, Option<TempDir>)> {
    let made_up = [made_up::scene("llama"), made_up::scene("qwen2"), made_up::quantised_scene()];
    let mut scenes: Vec<_> =
        made_up.into_iter().map(|(files, adapters, folder)| (files, adapters, Some(folder))).collect();
    let conditioned = |folder: PathBuf, files: &ModelFiles| {
        let adapter = Adapter::load(&folder, &files.config, &files.fingerprint).expect("a sound adapter");
        let preference: &[f32] = if adapter.objectives().is_empty() { &[] } else { &[0.3, 0.7] };
        Arc::new(adapter).condition(preference).expect("on the simplex")
    };
    if let (Some(files), Some(golden)) = (demo_model(), shared().map(|folder| folder.join("golden"))) {
        let names = ["adapter-moslora", "adapter-pblora", "adapter-lora"];
        let adapters = names.map(|name| conditioned(golden.join(name), &files)).into();
        scenes.push((files, adapters, None));
    }
    scenes
}

fn prompt(seed: u32, count: u32, vocabulary: usize) -> Vec<u32> {
    let number = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 7;
    (0..count).map(|i| number(i) % vocabulary as u32).collect()
}

/// Steps of prefill chunks and decode rows, with adapters and without: the logits of all of them.
fn script(model: &mut dyn Forward, adapters: &[Conditioned]) -> Vec<Vec<u32>> {
    let vocabulary = model.vocabulary();
    let adapter_of = |index: usize| if index.is_multiple_of(2) { None } else { adapters.get(index / 2) };
    let mut sequences: Vec<Sequence<'_>> = (0..2 * adapters.len().max(1))
        .map(|index| {
            let blocks = index as u32 * BLOCKS..(index as u32 + 1) * BLOCKS;
            Sequence::new(&prompt(index as u32, 30 + 7 * index as u32, vocabulary), blocks, adapter_of(index))
        })
        .collect();
    let mut all = Vec::new();
    let mut logits = Vec::new();
    // One row alone, then each of the others joins by a chunk of its prompt while those before it decode.
    for round in 0..sequences.len() + 2 {
        let rows: Vec<Row<'_>> = sequences
            .iter()
            .take(round + 1)
            .map(|sequence| {
                let chunk = &sequence.tokens[sequence.computed..];
                let tokens = &chunk[..chunk.len().min(23)];
                // A whole prompt is wanted at its last two positions.
                let logits_from =
                    if tokens.len() == chunk.len() { tokens.len().saturating_sub(2) } else { tokens.len() };
                Row { tokens, logits_from, ..sequence.row() }
            })
            .collect();
        model.forward(&rows, &mut logits).expect("sound rows");
        let counts: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        all.push(bits(&logits));
        for (index, (sequence, count)) in sequences.iter_mut().zip(counts).enumerate() {
            sequence.computed += count;
            if sequence.computed == sequence.tokens.len() {
                sequence.tokens.push(((index * 31 + round * 7) % vocabulary) as u32);
            }
        }
    }
    all
}

/// Runs `lead` at rank 0 of a group of threads; returns what it says, and why each follower ended.
fn sharded<T: Send>(
    (files, threads, stages): (&ModelFiles, usize, usize),
    ranks: Vec<Box<dyn Collective>>,
    adapters: &[Arc<Adapter>],
    lead: impl FnOnce(&mut dyn Forward) -> T + Send,
) -> (T, Vec<ModelError>) {
    let size = ranks.len();
    let part = |rank| Part { rank, size, stages };
    thread::scope(|scope| {
        let mut ranks = ranks.into_iter().enumerate();
        let (_, leader) = ranks.next().expect("a rank 0");
        let followers: Vec<_> = ranks
            .map(|(rank, group)| {
                scope.spawn(move || {
                    let shard = Shard::load(files, &options(threads), part(rank)).expect("a part");
                    let mut shard = shard.ranked_by(ranking);
                    match shard.join(group) {
                        Ok(()) => shard.follow(adapters),
                        Err(error) => error,
                    }
                })
            })
            .collect();
        let mut shard = Shard::load(files, &options(threads), part(0)).expect("a part").ranked_by(ranking);
        shard.join(leader).expect("a group");
        let mut leader = shard.lead(|_| {});
        let said = lead(&mut leader);
        drop(leader);
        (said, followers.into_iter().map(|follower| follower.join().expect("no panic")).collect())
    })
}

/// Not the product's: any will do that all ranks know.
fn ranking(wanted: &Likeliest, (slice, first): (&[f32], u32), out: &mut Vec<Candidate>) {
    let luck = |id: u32, at: NoiseAt| {
        let mixed = (id ^ at.position.wrapping_mul(40_503) ^ at.choice).wrapping_add(at.seed as u32);
        (mixed.wrapping_mul(2_654_435_761) >> 16) as f32 / 8192.0
    };
    let place = |logit: f32, id| wanted.scale * logit + wanted.noise.map_or(0.0, |at| luck(id, at));
    let mut all: Vec<Candidate> = slice
        .iter()
        .zip(first..)
        .map(|(logit, id)| Candidate { rank: place(*logit, id), id, logit: *logit })
        .collect();
    all.sort_by(|a, b| b.rank.total_cmp(&a.rank).then(a.id.cmp(&b.id)));
    out.extend(all.into_iter().take(wanted.count));
}

fn local(group: Group) -> Vec<Box<dyn Collective>> {
    let ranks = Local::group(group).expect("ranks");
    ranks.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect()
}

#[test]
fn any_number_of_ranks_has_the_bits_of_one() {
    for (files, conditioned, _folder) in scenes() {
        let mut whole = Llama::load(&files, &options(1)).expect("a sound model");
        let expected = script(&mut whole, &conditioned);
        let adapters = adapters_of(&conditioned);
        for (size, threads) in [(1, 1), (2, 1), (3, 2), (4, 1)] {
            let lead = |model: &mut dyn Forward| script(model, &conditioned);
            let (found, _) = sharded((&files, threads, 1), local(group(size)), &adapters, lead);
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found == expected, "{}: step {step} of {size} ranks", files.name);
            }
        }
    }
}

/// Four prompts long enough that a step of them is cut into micro-batches, in the middle of rows too.
struct Prompts {
    tokens: Vec<Vec<u32>>,
    blocks: Vec<Vec<u32>>,
}

impl Prompts {
    fn new(vocabulary: usize) -> Self {
        let blocks = |sequence| (sequence * BLOCKS..(sequence + 1) * BLOCKS).collect();
        Self {
            tokens: (0..4).map(|seed| prompt(seed, 61 + 5 * seed, vocabulary)).collect(),
            blocks: (0..4).map(blocks).collect(),
        }
    }

    fn row(&self, sequence: usize, from: usize, to: usize, logits_from: usize) -> Row<'_> {
        let tokens = &self.tokens[sequence][from..to];
        Row { tokens, start: from, blocks: &self.blocks[sequence], logits_from, adapter: None }
    }
}

/// Steps of such prompts.
fn long_script(model: &mut dyn Forward, adapters: &[Conditioned]) -> Vec<Vec<u32>> {
    let prompts = Prompts::new(model.vocabulary());
    let row = |sequence: usize, from: usize, to: usize, logits_from: usize| Row {
        adapter: adapters.get(sequence),
        ..prompts.row(sequence, from, to, logits_from)
    };
    let steps = [
        vec![row(0, 0, 60, 0), row(1, 0, 66, 60), row(2, 0, 30, 30), row(3, 0, 76, 75)],
        vec![row(2, 30, 71, 40), row(0, 60, 61, 0)],
    ];
    let mut logits = Vec::new();
    let mut forward = |rows: &Vec<Row<'_>>| {
        model.forward(rows, &mut logits).expect("sound rows");
        bits(&logits)
    };
    steps.iter().map(&mut forward).collect()
}

#[test]
fn stages_have_the_bits_of_one_process() {
    let mut tried = 0;
    for (files, conditioned, _folder) in scenes() {
        let whole = || Llama::load(&files, &options(1)).expect("a sound model");
        let expected = (script(&mut whole(), &conditioned), long_script(&mut whole(), &conditioned));
        let adapters = adapters_of(&conditioned);
        let shapes = [(2, 2, 1), (2, 4, 1), (3, 3, 2)];
        for (stages, size, threads) in shapes.into_iter().filter(|shape| shape.0 <= files.config.layers) {
            let lead =
                |model: &mut dyn Forward| (script(model, &conditioned), long_script(model, &conditioned));
            let (found, _) = sharded((&files, threads, stages), local(group(size)), &adapters, lead);
            assert!(found == expected, "{}: {stages} stages of {size} ranks", files.name);
            tried += 1;
        }
    }
    assert!(tried > 2, "models have layers to divide");
}

/// Of two steps the bits of whole rows, of lists, and of the rows behind these, the last one first.
type Handed = Vec<(Vec<u32>, Vec<Vec<[u32; 3]>>, Vec<u32>)>;

/// The same of one step, as it comes.
type Step = (Vec<f32>, Lists, Vec<f32>);

/// Steps of which some rows are wanted as lists, ranked with noise or without.
fn listed_script(mut forward: impl FnMut(&[Row<'_>], &[Option<Likeliest>]) -> Step) -> Handed {
    let prompts = Prompts::new(32);
    let row = |sequence, from, to, logits_from| prompts.row(sequence, from, to, logits_from);
    let noise = |position| Some(NoiseAt { seed: 7 << 33 | 5, choice: 2, position });
    let noisy = |count, position| Some(Likeliest { count, scale: 1.5, noise: noise(position) });
    let plain = |count| Some(Likeliest { count, scale: 1.0, noise: None });
    let steps = [
        (
            vec![row(0, 0, 60, 50), row(1, 0, 66, 60), row(2, 0, 30, 30), row(3, 0, 76, 75)],
            [noisy(5, 0), None, plain(3), plain(1_000_000)],
        ),
        (vec![row(2, 30, 71, 30), row(0, 60, 61, 0)], [None, noisy(64, 11), None, None]),
    ];
    let bits_of = |list: &[Candidate]| -> Vec<[u32; 3]> {
        list.iter().map(|token| [token.rank.to_bits(), token.id, token.logit.to_bits()]).collect()
    };
    steps
        .iter()
        .map(|(rows, wanted)| {
            let (logits, lists, behind) = forward(rows, &wanted[..rows.len()]);
            (bits(&logits), lists.iter().map(bits_of).collect(), bits(&behind))
        })
        .collect()
}

#[test]
fn ranks_hand_over_the_lists_of_one_process() {
    for (files, _, _folder) in scenes() {
        let mut whole = Llama::load(&files, &options(1)).expect("a sound model");
        let vocabulary = whole.vocabulary();
        let expected = listed_script(|rows, wanted| {
            let (mut logits, mut kept, mut lists) = (Vec::new(), Vec::new(), Lists::default());
            whole.forward(rows, &mut logits).expect("sound rows");
            let mut behind: Vec<&[f32]> = Vec::new();
            let mut of = logits.chunks_exact(vocabulary);
            for (row, wanted) in rows.iter().zip(wanted) {
                for (offset, logits) in of.by_ref().take(row.wanted()).enumerate() {
                    match wanted.map(|wanted| wanted.later(offset)) {
                        None => kept.extend_from_slice(logits),
                        Some(wanted) => {
                            let mut list = Vec::new();
                            ranking(&wanted, (logits, 0), &mut list);
                            lists.push(&wanted, vocabulary, list.into_iter());
                            behind.push(logits);
                        }
                    }
                }
            }
            behind.reverse();
            (kept, lists, behind.concat())
        });
        assert!(
            expected
                .iter()
                .all(|(rows, lists, _)| !rows.is_empty() && lists.iter().all(|list| !list.is_empty()))
        );
        let shapes = [(1, 1, 1), (1, 2, 1), (1, 3, 2), (1, 4, 1), (2, 2, 1), (2, 4, 1)];
        for (stages, size, threads) in shapes.into_iter().filter(|shape| shape.0 <= files.config.layers) {
            let lead = |model: &mut dyn Forward| {
                assert!(model.gives_lists());
                listed_script(|rows, wanted| {
                    let (mut logits, mut lists, mut behind) = (Vec::new(), Lists::default(), Vec::new());
                    model.forward_listed((rows, wanted), (&mut logits, &mut lists)).expect("sound rows");
                    let listed = lists.iter().count() as u64;
                    let numbers: Vec<u64> = (lists.first..lists.first + listed).rev().collect();
                    model.listed_rows(&numbers, &mut behind).expect("they are kept");
                    (logits, lists, behind)
                })
            };
            let (found, _) = sharded((&files, threads, stages), local(group(size)), &[], lead);
            assert!(found == expected, "{}: {stages} stages of {size} ranks", files.name);
        }
    }
}

#[test]
fn what_travels_of_a_list_is_three_words_for_each_token() {
    let (files, _, _folder) = made_up::scene("llama");
    let lead = |model: &mut dyn Forward| {
        let row = Row { tokens: &[1, 2], start: 0, blocks: &[0], logits_from: 0, adapter: None };
        let (mut logits, mut lists) = (Vec::new(), Lists::default());
        let mut bytes = |wanted| {
            model.forward_listed((&[row], &[wanted]), (&mut logits, &mut lists)).expect("a sound row");
            lists.gathered_bytes
        };
        let list = Likeliest { count: 4, scale: 1.0, noise: None };
        let (whole, listed) = (bytes(None), bytes(Some(list)));
        (listed, whole, model.listed_rows(&[1], &mut logits).expect("it is kept"))
    };
    let ((listed, whole, behind), _) = sharded((&files, 1, 1), local(group(2)), &[], lead);
    assert_eq!(listed, 2 * 4 * (1 + 3 * 4), "two positions, from one other rank");
    assert_eq!(whole, 2 * 4 * files.config.vocabulary.div_ceil(2));
    assert_eq!(behind, whole / 2, "one position");
}

#[test]
fn the_latest_rows_behind_lists_are_kept_whatever_is_computed_meanwhile() {
    let (files, _, _folder) = made_up::scene("llama");
    let lead = |model: &mut dyn Forward| {
        let (mut logits, mut lists, mut row_behind) = (Vec::new(), Lists::default(), Vec::new());
        let list = Some(Likeliest { count: 4, scale: 1.0, noise: None });
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for step in 0..200_u32 {
            let row =
                Row { tokens: &[1 + step % 9, 2], start: 0, blocks: &[0], logits_from: 0, adapter: None };
            model.forward(&[row], &mut logits).expect("a sound row");
            rows.extend(logits.chunks_exact(model.vocabulary()).map(<[f32]>::to_vec));
            model.forward_listed((&[row], &[list]), (&mut logits, &mut lists)).expect("a sound row");
            assert_eq!(lists.first, u64::from(step) * 2);
            for age in [0, 1, 97, 255].into_iter().filter(|age| *age < rows.len()) {
                let number = rows.len() - 1 - age;
                model.listed_rows(&[number as u64], &mut row_behind).expect("it is kept");
                assert!(bits(&row_behind) == bits(&rows[number]), "step {step}, {age} lists ago");
            }
        }
        for number in [0, 143, 400, u64::MAX] {
            let error = model.listed_rows(&[number], &mut logits).expect_err("it is not kept");
            assert!(error.to_string().contains("not kept"), "{error}");
        }
        model.listed_rows(&[144], &mut logits).expect("nobody waits for rows that were not there");
    };
    sharded((&files, 1, 1), local(group(2)), &[], lead);
}

#[test]
fn a_rank_that_cannot_make_lists_says_so() {
    let (files, _, _folder) = made_up::scene("llama");
    let [zero, one] = Local::group(group(2)).expect("two ranks").try_into().ok().expect("two");
    thread::scope(|scope| {
        let files = &files;
        let follower = scope.spawn(move || {
            let mut shard = Shard::load(files, &options(1), (1, 2)).expect("a part");
            shard.join(Box::new(one)).expect("a group");
            shard.follow(&[]).to_string()
        });
        let mut shard = Shard::load(files, &options(1), (0, 2)).expect("a part").ranked_by(ranking);
        shard.join(Box::new(zero)).expect("a group");
        let mut leader = shard.lead(|_| {});
        let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
        let wanted = [Some(Likeliest { count: 4, scale: 1.0, noise: None })];
        let error = leader.forward_listed((&[row], &wanted), (&mut Vec::new(), &mut Lists::default()));
        assert!(matches!(error, Err(ModelError::Group(_))), "its part is missing");
        drop(leader);
        let ended = follower.join().expect("no panic");
        assert!(ended.contains("was not told how to make them"), "{ended}");
    });
}

#[test]
fn a_stage_holds_its_layers_alone() {
    for (files, _, _folder) in scenes().into_iter().filter(|(files, ..)| files.config.layers > 1) {
        let whole = Llama::load(&files, &options(1)).expect("a sound model");
        let stage =
            |rank| Shard::load(&files, &options(1), Part { rank, size: 2, stages: 2 }).expect("a part");
        let stages = [stage(0), stage(1)];
        let bytes: usize = stages.iter().map(Shard::weight_bytes).sum();
        // Embeddings that are the output projection too are held twice.
        assert!((whole.weight_bytes()..2 * whole.weight_bytes()).contains(&bytes), "{bytes}");
        assert_eq!(stages.iter().map(Shard::block_bytes).sum::<usize>(), whole.block_bytes());
    }
}

#[test]
fn a_rank_holds_its_part_of_the_weights() {
    for (files, _, _folder) in scenes() {
        let whole = Llama::load(&files, &options(1)).expect("a sound model");
        for size in 2..=4 {
            let parts: Vec<Shard> = (0..size)
                .map(|rank| Shard::load(&files, &options(1), (rank, size)).expect("a part"))
                .collect();
            let bytes: Vec<usize> = parts.iter().map(Shard::weight_bytes).collect();
            println!("{}: {} bytes in one, {bytes:?} in {size}", files.name, whole.weight_bytes());
            assert!(bytes.iter().sum::<usize>() >= whole.weight_bytes());
            // Small models have few heads to divide, and panels that are not full.
            if files.config.hidden > 500 {
                assert!(
                    bytes.iter().all(|bytes| *bytes < whole.weight_bytes() * 12 / (10 * size)),
                    "{bytes:?}"
                );
            }
        }
    }
}

#[test]
fn more_ranks_than_heads_are_refused_in_a_sentence() {
    let (files, _, _folder) = made_up::scene("llama");
    let error = Shard::load(&files, &options(1), (0, 5)).err().expect("4 heads").to_string();
    assert!(error.contains("5 ranks share this model's 4 query heads"), "{error}");
}

#[test]
fn stages_that_cannot_be_are_refused_in_a_sentence() {
    let (files, _, _folder) = made_up::scene("llama");
    let refused = |size, stages| {
        let part = Part { rank: 0, size, stages };
        Shard::load(&files, &options(1), part).err().expect("no such part").to_string()
    };
    let layers = files.config.layers;
    assert!(refused(layers + 1, layers + 1).contains(&format!("at most {layers} can")));
    assert!(refused(3, 2).contains("3 ranks are not a multiple of 2 stages"));
}

#[test]
fn ranks_that_differ_find_out_before_they_compute() {
    let (files, _, _folder) = made_up::scene("llama");
    let (other, _, _other_folder) = made_up::scene("qwen2");
    let smaller = LlamaOptions { kv_blocks: 32, ..options(1) };
    let cases =
        [(&other, options(1), "other weights"), (&files, smaller, "32 blocks of 16 tokens, not 64 of 16")];
    for (follower_files, follower_options, sentence) in cases {
        let [leader, follower] = Local::group(group(2)).expect("two ranks").try_into().ok().expect("two");
        thread::scope(|scope| {
            let follower = scope.spawn(move || {
                let mut shard = Shard::load(follower_files, &follower_options, (1, 2)).expect("a part");
                shard.join(Box::new(follower)).expect_err("they differ").to_string()
            });
            let mut shard = Shard::load(&files, &options(1), (0, 2)).expect("a part");
            let error = shard.join(Box::new(leader)).expect_err("they differ").to_string();
            for error in [error, follower.join().expect("no panic")] {
                assert!(error.contains("rank 1 has") && error.contains(sentence), "{error}");
            }
        });
    }
    let [leader, follower] = Local::group(group(2)).expect("two ranks").try_into().ok().expect("two");
    thread::scope(|scope| {
        let staged = Part { rank: 1, size: 2, stages: 2 };
        let mut follower_part = Shard::load(&files, &options(1), staged).expect("a part");
        scope.spawn(move || follower_part.join(Box::new(follower)).expect_err("they differ"));
        let mut shard = Shard::load(&files, &options(1), (0, 2)).expect("a part");
        let error = shard.join(Box::new(leader)).expect_err("they differ").to_string();
        assert!(error.contains("rank 1 has other stages (2, not 1) than rank 0"), "{error}");
    });
    let rounding = Group { payload: Payload::Bf16, ..group(1) };
    let mut shard = Shard::load(&files, &options(1), (0, 1)).expect("a part");
    let error = shard.join(local(rounding).remove(0)).expect_err("it rounds").to_string();
    assert!(error.starts_with("payload: "), "{error}");
}

#[test]
fn a_lost_rank_ends_the_step_and_the_next_group_goes_on_over_the_same_weights() {
    let (files, conditioned, _folder) = made_up::scene("llama");
    let adapters = adapters_of(&conditioned);
    let mut whole = Llama::load(&files, &options(1)).expect("a sound model");
    let expected = script(&mut whole, &conditioned);
    let mut lost = Shard::load(&files, &options(1), (1, 3)).expect("a part");
    let mut other = Shard::load(&files, &options(1), (2, 3)).expect("a part");
    // At the first call of a step, between two layers, and while logits are collected.
    for call in [1, 2, 7, 8, 11, 40] {
        let began = Instant::now();
        let [zero, one, two] = Local::group(group(3)).expect("three ranks").try_into().ok().expect("three");
        let one = Faulty::new(Box::new(one), TIMEOUT, Schedule::once(call, Fault::Death));
        thread::scope(|scope| {
            let adapters = &adapters;
            let lost = &mut lost;
            let other = &mut other;
            let followers = [
                scope.spawn(move || lost.join(Box::new(one)).err().unwrap_or_else(|| lost.follow(adapters))),
                scope
                    .spawn(move || other.join(Box::new(two)).err().unwrap_or_else(|| other.follow(adapters))),
            ];
            let mut shard = Shard::load(&files, &options(1), (0, 3)).expect("a part");
            shard.join(Box::new(zero)).expect("a group");
            let (said, heard) = std::sync::mpsc::channel();
            let mut leader = shard.lead(move |error| said.send(error.to_string()).expect("a listener"));
            let row = Row { tokens: &[1, 2], start: 0, blocks: &[0], logits_from: 0, adapter: None };
            let error =
                std::iter::repeat_with(|| leader.forward(&[row], &mut Vec::new())).find_map(Result::err);
            assert!(matches!(error, Some(ModelError::Group(_))), "call {call}: {error:?}");
            assert!(leader.forward(&[row], &mut Vec::new()).is_err(), "the group stays over");
            assert_eq!(heard.iter().count(), 1, "the loss is told once");
            for follower in followers {
                let ended = follower.join().expect("no panic");
                assert!(matches!(ended, ModelError::Group(_)), "call {call}: {ended}");
            }
        });
        assert!(began.elapsed() < TIMEOUT / 2, "call {call}");
    }
    // The same parts in another group: what their caches hold is never read.
    let [zero, one, two] = Local::group(group(3)).expect("three ranks").try_into().ok().expect("three");
    thread::scope(|scope| {
        for (shard, group) in [(&mut lost, one), (&mut other, two)] {
            let adapters = &adapters;
            scope.spawn(move || {
                shard.join(Box::new(group)).expect("a group");
                shard.follow(adapters)
            });
        }
        let mut shard = Shard::load(&files, &options(1), (0, 3)).expect("a part");
        shard.join(Box::new(zero)).expect("a group");
        assert!(script(&mut shard.lead(|_| {}), &conditioned) == expected, "after a loss");
    });
}

#[test]
fn a_lost_stage_ends_the_step_of_all_others() {
    let (files, _, _folder) = made_up::scene("llama");
    let stages = files.config.layers.min(3);
    assert!(stages > 1, "a model with layers to divide");
    for call in [1, 2, 3, 4, 9] {
        let began = Instant::now();
        let mut ranks = local(group(stages));
        let last = ranks.pop().expect("ranks");
        ranks.push(Box::new(Faulty::new(last, TIMEOUT, Schedule::once(call, Fault::Death))));
        let lead = |model: &mut dyn Forward| {
            let tokens = prompt(1, 70, model.vocabulary());
            let row =
                Row { tokens: &tokens, start: 0, blocks: &[0, 1, 2, 3, 4], logits_from: 68, adapter: None };
            std::iter::repeat_with(|| model.forward(&[row], &mut Vec::new())).find_map(Result::err)
        };
        let (error, ended) = sharded((&files, 1, stages), ranks, &[], lead);
        assert!(matches!(error, Some(ModelError::Group(_))), "call {call}: {error:?}");
        assert!(ended.iter().all(|ended| matches!(ended, ModelError::Group(_))), "call {call}: {ended:?}");
        assert!(began.elapsed() < TIMEOUT / 2, "call {call}");
    }
}

#[test]
fn a_leader_without_work_notices_that_a_rank_hangs() {
    let (files, _, _folder) = made_up::scene("llama");
    let short = Group { timeout: Duration::from_millis(500), ..group(2) };
    let mut ranks = local(short);
    let hanging = Faulty::new(ranks.remove(1), short.timeout * 8, Schedule::once(2, Fault::Silence));
    ranks.push(Box::new(hanging));
    let lead = |model: &mut dyn Forward| {
        let began = Instant::now();
        while model.idle().is_ok() {
            assert!(began.elapsed() < TIMEOUT, "it goes on without its follower");
            thread::sleep(Duration::from_millis(20));
        }
    };
    sharded((&files, 1, 1), ranks, &[], lead);
}

/// Adapters of which the followers know nothing, one after the other, and one that comes again.
#[test]
fn followers_are_given_the_adapters_that_they_have_not() {
    let (files, _, folder) = made_up::scene("llama");
    let load = |name: &str| {
        let folder = folder.path().join(name);
        let digest = AdapterFiles::digest(&folder).expect("an adapter's files");
        let adapter = Adapter::load_to_share(&folder, &files.config, &files.fingerprint, &digest);
        Arc::new(adapter.expect("a sound adapter"))
    };
    let script = |model: &mut dyn Forward| -> Vec<Vec<u32>> {
        let mut logits = Vec::new();
        let mut ask = |adapter: Option<&Conditioned>| {
            let row = Row { tokens: &[1, 9, 4], start: 0, blocks: &[0], logits_from: 0, adapter };
            model.forward(&[row], &mut logits).expect("both are there");
            bits(&logits)
        };
        let kept = load("moslora").condition(&[0.3, 0.7]).expect("on the simplex");
        let mut found = vec![ask(None), ask(Some(&kept))];
        for preference in [[0.3, 0.7], [1.0, 0.0]] {
            // With other files, with the same ones, and again when nobody has them any more.
            for (name, preference) in [("lora", &[][..]), ("moslora", &preference)] {
                let gone = load(name).condition(preference).expect("on the simplex");
                found.push(ask(Some(&gone)));
            }
            found.push(ask(Some(&kept)));
        }
        found
    };
    let expected = script(&mut Llama::load(&files, &options(1)).expect("a model"));
    let (found, ended) = sharded((&files, 1, 1), local(group(2)), &[], script);
    assert!(found == expected);
    assert!(matches!(ended[..], [ModelError::Group(_)]), "{ended:?}");
}

#[test]
fn a_leader_without_work_says_so_and_its_followers_stay() {
    let (files, _, _folder) = made_up::scene("llama");
    let short = Group { timeout: Duration::from_millis(900), ..group(2) };
    let lead = |model: &mut dyn Forward| {
        let began = Instant::now();
        while began.elapsed() < 2 * short.timeout {
            model.idle().expect("a follower that waits is no lost one");
            thread::sleep(Duration::from_millis(50));
        }
        let row = Row { tokens: &[1], start: 0, blocks: &[0], logits_from: 0, adapter: None };
        model.forward(&[row], &mut Vec::new()).expect("both are there");
    };
    let (_, ended) = sharded((&files, 1, 1), local(short), &[], lead);
    assert!(matches!(ended[..], [ModelError::Group(_)]));
}
