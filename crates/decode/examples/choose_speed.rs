//! Prints what choosing a token costs, by vocabulary: the base worker's choice and the reward worker's lists.
//!
//! `cargo run --release -p uniarm-decode --example choose_speed`

use std::hint::black_box;
use std::time::Instant;

use uniarm_decode::{
    Choice, Chooser, History, Noise, Position, Sampling, Term, TermLogits, TopList, log_sum_exp,
    noisy_top_list, top_list,
};

const LIST: usize = 32;
const ROUNDS: u32 = 200;
const VOCABULARIES: [usize; 4] = [32_000, 49_152, 128_256, 151_936];
const NOISE: Noise = Noise::new(7, 0);

/// Logits of one position in outline.
struct Rows {
    base: Vec<f32>,
    reward: Vec<f32>,
}

/// What the base worker knows of the reward's row.
#[derive(Clone, Copy)]
enum Known {
    /// No guidance.
    Nothing,
    Whole,
    List,
    NoisyList,
}

fn main() {
    println!(
        "microseconds per row; one term of strength 1, lists of {LIST}; minimum / median of {ROUNDS} positions"
    );
    let titles: Vec<String> = VOCABULARIES.iter().map(|vocabulary| format!("{vocabulary:>15}")).collect();
    println!("{:36} {}", "vocabulary", titles.join(" "));
    let rows = VOCABULARIES.map(rows);
    let print = |name: &str, measure: &dyn Fn(&Rows) -> String| {
        let cells: Vec<String> = rows.iter().map(|rows| format!("{:>15}", measure(rows))).collect();
        println!("{name:36} {}", cells.join(" "));
    };
    print("reward: list", &|rows| time(|_| discard(top_list(&rows.reward, LIST))));
    print("reward: noisy list", &|rows| {
        time(|position| discard(noisy_top_list(&rows.reward, LIST, 1.0, &NOISE, position)))
    });
    print("reward: log-sum-exp", &|rows| time(|_| discard(log_sum_exp(&rows.reward))));
    for (name, sampling) in samplings() {
        for (known_name, known) in [
            ("unguided", Known::Nothing),
            ("whole row", Known::Whole),
            ("list", Known::List),
            ("noisy list", Known::NoisyList),
        ] {
            let useless = sampling.is_greedy() || sampling.has_filters();
            if !(useless && matches!(known, Known::NoisyList)) {
                print(&format!("base: {name}, {known_name}"), &|rows| choose(rows, &sampling, known));
            }
        }
    }
}

fn samplings() -> [(&'static str, Sampling); 7] {
    let plain = Sampling::default();
    [
        ("greedy", Sampling { temperature: 0.0, ..plain }),
        ("T = 1", plain),
        ("T = 0.7", Sampling { temperature: 0.7, ..plain }),
        ("T = 1, top-k 50", Sampling { top_k: 50, ..plain }),
        ("T = 1, top-p 0.9", Sampling { top_p: 0.9, ..plain }),
        ("T = 1, min-p 0.05", Sampling { min_p: 0.05, ..plain }),
        ("T = 1, penalty", Sampling { repetition_penalty: 1.1, ..plain }),
    ]
}

/// Time of one choice, whether it is a token or a question. A worker has made the lists beforehand.
fn choose(rows: &Rows, sampling: &Sampling, known: Known) -> String {
    let history = History::new(&(0..500).collect::<Vec<u32>>());
    let mut chooser = Chooser::new(rows.base.len());
    let lists: Vec<TopList> = (0..ROUNDS)
        .map(|position| match known {
            Known::Nothing | Known::Whole => TopList::default(),
            Known::List => top_list(&rows.reward, LIST),
            Known::NoisyList => {
                noisy_top_list(&rows.reward, LIST, 1.0 / sampling.temperature, &NOISE, position)
            }
        })
        .collect();
    time(|position| {
        let logits = match known {
            Known::Nothing | Known::Whole => TermLogits::Dense(&rows.reward),
            Known::List | Known::NoisyList => TermLogits::List(&lists[position as usize]),
        };
        let term = [Term { strength: 1.0, logits }];
        let terms = if matches!(known, Known::Nothing) { &[][..] } else { &term[..] };
        let place =
            Position { base: &rows.base, terms, sampling, history: &history, noise: &NOISE, position };
        let choice = chooser.choose(&place);
        assert!(!matches!(choice, Choice::Dense), "lists of such rows nearly suffice");
        discard(choice);
    })
}

/// Keeps the compiler from skipping what nobody reads.
fn discard<T>(value: T) {
    let _ = black_box(value);
}

fn time(mut run: impl FnMut(u32)) -> String {
    let mut micros: Vec<f64> = (0..ROUNDS)
        .map(|position| {
            let start = Instant::now();
            run(position);
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    micros.sort_by(f64::total_cmp);
    format!("{:.1} / {:.1}", micros[0], micros[micros.len() / 2])
}

/// Base and reward logits with the outline of a language model's: normal with deviation 2.5, a dozen far
/// above, and in agreement about those.
fn rows(vocabulary: usize) -> Rows {
    let mut normals = vec![0.0; 2 * vocabulary];
    Noise::new(1, 0).fill(0, &mut normals);
    // The difference of two Gumbel variables is logistic: close enough.
    let row = |offset: usize| -> Vec<f32> {
        let draws = &normals[offset..offset + vocabulary];
        let mut row: Vec<f32> = draws.iter().rev().zip(draws).map(|(a, b)| 1.4 * (a - b)).collect();
        for (rank, index) in (0..vocabulary).step_by(vocabulary / 12).enumerate() {
            row[index] = 16.0 - 0.7 * rank as f32 + 0.3 * draws[index];
        }
        row
    };
    Rows { base: row(0), reward: row(vocabulary) }
}
