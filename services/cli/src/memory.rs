//! What this process may have of memory, and whether a cache fits.

use std::fs;

use anyhow::bail;
use uniarm_model::{Llama, ModelFiles};

const GIB: f64 = (1 << 30) as f64;

/// Refuses a cache that would be larger than all memory: a worker takes it at the start, which would end the process without
/// a word.
///
/// # Errors
/// Says what the cache needs, and what there is.
pub fn check_cache(files: &ModelFiles, tokens: usize) -> anyhow::Result<()> {
    let Some(most) = bytes_max() else { return Ok(()) };
    let of_token = Llama::kv_token_bytes(files)?;
    let wanted = of_token as f64 * tokens as f64;
    if wanted > most {
        bail!(
            "--kv-tokens wants a cache of {:.1} GiB ({of_token} bytes for each of {tokens} tokens), and this machine has {:.1} \
             GiB of memory, or may use no more: up to {} tokens would fit without the weights",
            wanted / GIB,
            most / GIB,
            (most / of_token as f64) as u64
        );
    }
    Ok(())
}

/// The machine's memory, or the limit of its container.
fn bytes_max() -> Option<f64> {
    let of_kernel = fs::read_to_string("/proc/meminfo").ok()?;
    let line = of_kernel.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    let of_container = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    // `max` where there is none.
    let limit = of_container.and_then(|bytes| bytes.trim().parse::<f64>().ok());
    Some(limit.map_or(kilobytes * 1024.0, |limit| limit.min(kilobytes * 1024.0)))
}
