//! Prints what choosing a token costs, by vocabulary, for whole rows and for lists.
//!
//! `cargo run --release -p uniarm-decode --example choose_speed`

use std::hint::black_box;
use std::time::Instant;

use uniarm_decode::{
    Choice, Chooser, History, Noise, Position, Sampling, Term, TermLogits, log_sum_exp, top_list,
};

const LIST: usize = 32;
const ROUNDS: u32 = 200;

fn main() {
    println!(
        "microseconds; one term of strength 1, lists of {LIST}; minimum and median of {ROUNDS} positions"
    );
    println!("{:28} {:>15} {:>15} {:>15} {:>15}", "vocabulary", "32,000", "49,152", "128,256", "151,936");
    let rows: Vec<(Vec<f32>, Vec<f32>)> = [32_000, 49_152, 128_256, 151_936].map(pair).into();

    let print = |name: &str, measure: &dyn Fn(&[f32], &[f32]) -> String| {
        let cells: Vec<String> =
            rows.iter().map(|(base, reward)| format!("{:>15}", measure(base, reward))).collect();
        println!("{name:28} {}", cells.join(" "));
    };
    print("noise of a row", &|base, _| {
        let mut out = vec![0.0; base.len()];
        time(|position| Noise::new(7, 0).fill(position, black_box(&mut out)))
    });
    print("top list", &|_, reward| time(|_| discard(top_list(reward, LIST))));
    print("log-sum-exp", &|_, reward| time(|_| discard(log_sum_exp(reward))));

    let plain = Sampling::default();
    let samplings = [
        ("greedy", Sampling { temperature: 0.0, ..plain }),
        ("T = 1", plain),
        ("T = 0.7", Sampling { temperature: 0.7, ..plain }),
        ("T = 1, top-k 50", Sampling { top_k: 50, ..plain }),
        ("T = 1, top-p 0.9", Sampling { top_p: 0.9, ..plain }),
        ("T = 1, min-p 0.05", Sampling { min_p: 0.05, ..plain }),
        ("T = 1, penalties", Sampling { repetition_penalty: 1.1, ..plain }),
    ];
    let history = History::new(&(0..500).collect::<Vec<u32>>());
    for (name, sampling) in samplings {
        print(&format!("choose dense, {name}"), &|base, reward| {
            let mut chooser = Chooser::new(base.len());
            let terms = [Term { strength: 1.0, logits: TermLogits::Dense(reward) }];
            time(|position| {
                let position = place(base, &terms, &sampling, &history, position);
                assert!(matches!(black_box(chooser.choose(&position)), Choice::Token(_)));
            })
        });
        print(&format!("choose list,  {name}"), &|base, reward| {
            let mut chooser = Chooser::new(base.len());
            let list = top_list(reward, LIST);
            let terms = [Term { strength: 1.0, logits: TermLogits::List(&list) }];
            time(|position| discard(chooser.choose(&place(base, &terms, &sampling, &history, position))))
        });
    }
}

const NOISE: Noise = Noise::new(7, 0);

fn place<'a>(
    base: &'a [f32],
    terms: &'a [Term<'a>],
    sampling: &'a Sampling,
    history: &'a History,
    position: u32,
) -> Position<'a> {
    Position { base, terms, sampling, history, noise: &NOISE, position }
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
fn pair(vocabulary: usize) -> (Vec<f32>, Vec<f32>) {
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
    (row(0), row(vocabulary))
}
