//! What the arithmetic of quantised weights costs in quality: perplexity of a text beside that of f32.
//!
//!     cargo run --release -p uniarm-model --example perplexity -- MODEL TEXT_FILE

use std::path::Path;

use uniarm_model::{Forward, Llama, LlamaOptions, ModelError, OpenOptions, Row, open};

/// Each stretch of so many tokens is read by itself.
const STRETCH: usize = 512;

/// At most so many stretches: a minute on two cores.
const STRETCHES_MAX: usize = 16;

const BLOCK_TOKENS: usize = 16;

fn main() -> Result<(), ModelError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text] = &arguments[..] else {
        eprintln!("usage: perplexity MODEL TEXT_FILE");
        std::process::exit(2);
    };
    let files = open(model, &OpenOptions::default())?;
    let path = Path::new(text);
    let text =
        std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    let tokenizer = files.tokenizer.as_ref().expect("a model with a tokenizer");
    let tokens = tokenizer.encode(&text, false)?;
    let options = LlamaOptions {
        kv_blocks: STRETCH / BLOCK_TOKENS,
        block_tokens: BLOCK_TOKENS,
        ..LlamaOptions::default()
    };
    let stored = Losses::measure(&mut Llama::load(&files, &options)?, &tokens)?;
    let widened = Losses::measure(&mut Llama::load_widened(&files, &options)?, &tokens)?;
    println!("{}: {} tokens of {}", files.name, stored.count, path.display());
    println!("perplexity as stored {:.5}, as f32 {:.5}", stored.perplexity(), widened.perplexity());
    println!("difference {:+.4} %", 100.0 * (stored.perplexity() / widened.perplexity() - 1.0));
    Ok(())
}

/// Of every token but the first of each stretch, -ln p.
struct Losses {
    sum: f64,
    count: usize,
}

impl Losses {
    fn measure(model: &mut Llama, tokens: &[u32]) -> Result<Self, ModelError> {
        let blocks: Vec<u32> = (0..(STRETCH / BLOCK_TOKENS) as u32).collect();
        let mut losses = Self { sum: 0.0, count: 0 };
        let mut logits = Vec::new();
        for stretch in tokens.chunks(STRETCH).take(STRETCHES_MAX) {
            let row = Row { tokens: stretch, start: 0, blocks: &blocks, logits_from: 0, adapter: None };
            model.forward(&[row], &mut logits)?; // (stretch, vocabulary)
            let rows = logits.chunks_exact(model.vocabulary());
            for (logits, next) in rows.zip(&stretch[1..]) {
                losses.sum += loss(logits, *next as usize);
                losses.count += 1;
            }
        }
        Ok(losses)
    }

    fn perplexity(&self) -> f64 {
        (self.sum / self.count as f64).exp()
    }
}

/// ln Σ e^z - z of the token that came
fn loss(logits: &[f32], token: usize) -> f64 {
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|z| (f64::from(*z) - greatest).exp()).sum();
    greatest + sum.ln() - f64::from(logits[token])
}
