//! Tokens per second of one training step, and the memory that it takes, by batch and length.
//!
//! `cargo run --release -p uniarm-trainer --example training_speed -- MODEL [PAIRS PROMPT ANSWER [checkpoint]]`
//!
//! Tokens are counted as a plain implementation would feed them: prompt and answer for each answer, although the prompt
//! that both share runs once here.

use std::time::Instant;

use uniarm_model::OpenOptions;
use uniarm_trainer::loss::{Labels, Loss, Scalarisation};
use uniarm_trainer::network::{
    AdapterConfig, Conditioning, Head, LlamaNetwork, Method, Network as _, NetworkOptions, Objective, Sample,
    TokenPair,
};

/// Steps that are timed, after one that is not.
const STEPS: usize = 3;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model =
        arguments.next().ok_or_else(|| anyhow::anyhow!("name a model: a GGUF file, a folder, or hf://…"))?;
    let rest: Vec<String> = arguments.collect();
    let checkpoint_activations = rest.iter().any(|argument| argument == "checkpoint");
    let sizes: Vec<usize> = rest.iter().filter_map(|argument| argument.parse().ok()).collect();
    let files = uniarm_model::open(&model, &OpenOptions::default())?;
    let options = NetworkOptions { checkpoint_activations, ..NetworkOptions::default() };
    let mut network = LlamaNetwork::open(&files, &adapter(), options)?;
    let shapes = match sizes[..] {
        [pairs, prompt, answer] => vec![(pairs, prompt, answer)],
        _ => vec![(1, 36, 64), (4, 36, 64), (8, 36, 64), (8, 36, 128), (8, 128, 128)],
    };
    println!(
        "threads {}   pairs × (prompt + 2 answers)   tokens/s   rows/s   step   peak memory",
        rayon::current_num_threads()
    );
    for (pairs, prompt, answer) in shapes {
        measure(&mut network, (pairs, prompt, answer), files.config.vocabulary)?;
    }
    Ok(())
}

fn adapter() -> AdapterConfig {
    let objective =
        |name: &str, description: &str| Objective { name: name.into(), description: description.into() };
    AdapterConfig {
        method: Method::Moslora,
        rank: 8,
        mixed_rank: 0,
        alpha: 16.0,
        targets: ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec(),
        conditioning: Conditioning::Text,
        head: Head::Linear,
        head_units: 0,
        dropout: 0.0,
        objectives: vec![
            objective("positive", "positive: the answer is cheerful"),
            objective("concise", "concise: the answer is short"),
        ],
    }
}

fn measure(
    network: &mut LlamaNetwork,
    (pairs, prompt, answer): (usize, usize, usize),
    vocabulary: usize,
) -> anyhow::Result<()> {
    let token = |i: usize| (1000 + i * 7919 % (vocabulary - 2000)) as u32;
    let tokens = |from: usize, count: usize| (from..from + count).map(token).collect::<Vec<_>>();
    let pair = |index: usize| TokenPair {
        prompt: tokens(index * 1000, prompt),
        answers: [tokens(index * 1000 + 300, answer), tokens(index * 1000 + 600, answer)],
        labels: Labels { signs: vec![1.0, -1.0], margins: vec![0.5, -1.0] },
    };
    let made: Vec<TokenPair> = (0..pairs).map(pair).collect();
    let samples: Vec<Sample<'_>> =
        made.iter().map(|pair| Sample { pair, preference: &[0.3, 0.7], draw: 1 }).collect();
    let loss = Loss {
        scalarisation: Scalarisation::Linear,
        betas: vec![0.02; 2],
        global_beta: 0.02,
        global_weight: 0.5,
        likelihood_weight: 0.0,
    };
    let mut gradient = vec![0.0; network.parameter_count()];
    network.add_gradient(&samples, &loss, &mut gradient)?;
    let began = Instant::now();
    for _ in 0..STEPS {
        network.add_gradient(&samples, &loss, &mut gradient)?;
    }
    let seconds = began.elapsed().as_secs_f64() / STEPS as f64;
    let (fed, rows) = (pairs * 2 * (prompt + answer), pairs * (prompt + 2 * answer));
    println!(
        "{pairs:>9} × ({prompt} + 2 · {answer})   {:>7.0} tokens/s   {:>6.0} rows/s   {seconds:.2} s   {:.2} GB",
        fed as f64 / seconds,
        rows as f64 / seconds,
        peak_bytes()? / 1e9
    );
    Ok(())
}

/// Of this process so far.
fn peak_bytes() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kilobytes =
        line.and_then(|line| line.split_whitespace().nth(1)).and_then(|number| number.parse::<f64>().ok());
    Ok(kilobytes.ok_or_else(|| anyhow::anyhow!("/proc/self/status has no VmHWM"))? * 1024.0)
}
