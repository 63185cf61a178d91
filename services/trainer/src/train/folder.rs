//! The run folder: configuration, metrics, curve, adapter, checkpoints. One process at a time writes it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::{checkpoint::Checkpoints, config::TrainConfig};
use crate::pairs::BadLines;
use crate::whole_file;

const LOCK: &str = ".lock";
const CONFIG: &str = "config.toml";
const METRICS: &str = "metrics.jsonl";
/// Apart from the metrics, which are equal for two runs of one configuration.
const TIMES: &str = "times.jsonl";
const SKIPPED: &str = "skipped.jsonl";
const ADAPTER: &str = "adapter";

pub struct RunFolder {
    path: PathBuf,
    pub checkpoints: Checkpoints,
    metrics: File,
    metrics_bytes: u64,
    times: File,
    /// Held as long as the folder is open; the system lets go of it when the process dies, however it dies.
    _lock: File,
}

#[derive(Serialize)]
struct SkippedLine<'a> {
    file: String,
    line: usize,
    field: &'a str,
    fault: &'static str,
    reason: &'a str,
}

// === impl RunFolder ===

impl RunFolder {
    /// # Errors
    /// Where another process writes it, or it holds a run that is not to be continued.
    pub fn open(path: &Path, resume: bool) -> anyhow::Result<Self> {
        let shown = || path.display().to_string();
        std::fs::create_dir_all(path.join(ADAPTER)).with_context(shown)?;
        let append = |name: &str| {
            let file = OpenOptions::new().create(true).append(true).read(true).open(path.join(name));
            file.with_context(|| path.join(name).display().to_string())
        };
        let lock = append(LOCK)?;
        if let Err(error) = lock.try_lock() {
            bail!("{}: another process trains here ({error})", shown());
        }
        let checkpoints = Checkpoints::new(path);
        let metrics = append(METRICS)?;
        let metrics_bytes = metrics.metadata()?.len();
        ensure!(
            resume || (checkpoints.files()?.is_empty() && metrics_bytes == 0),
            "{} already holds a run: continue it with --resume, or name another folder with --out",
            shown()
        );
        let times = append(TIMES)?;
        Ok(Self { path: path.to_owned(), checkpoints, metrics, metrics_bytes, times, _lock: lock })
    }

    /// # Errors
    /// Where the file system refuses.
    pub fn describe(&self, config: &TrainConfig, skipped: &BadLines) -> anyhow::Result<()> {
        let text = toml::to_string_pretty(config).context("the configuration as TOML")?;
        whole_file::write(&self.path.join(CONFIG), text.as_bytes())?;
        let mut lines = String::new();
        for bad in &skipped.0 {
            let line = SkippedLine {
                file: bad.place.file.display().to_string(),
                line: bad.place.line,
                field: &bad.field,
                fault: bad.fault.name(),
                reason: &bad.reason,
            };
            lines += &serde_json::to_string(&line)?;
            lines.push('\n');
        }
        whole_file::write(&self.path.join(SKIPPED), lines.as_bytes())
    }

    /// Forgets metrics behind a checkpoint: the run will write them again.
    ///
    /// # Errors
    /// Where they are shorter than they were when it was written.
    pub fn cut_metrics(&mut self, bytes: u64) -> anyhow::Result<()> {
        let (file, has) = (self.path.join(METRICS), self.metrics_bytes);
        ensure!(has >= bytes, "{}: {has} bytes, and the checkpoint knows of {bytes}", file.display());
        self.metrics.set_len(bytes).with_context(|| file.display().to_string())?;
        self.metrics_bytes = bytes;
        Ok(())
    }

    /// # Errors
    /// Where the file system refuses.
    pub fn add_metric(&mut self, metric: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(metric)? + "\n";
        let written = self.metrics.write_all(line.as_bytes());
        written.with_context(|| {
            format!("{}; make room and go on with --resume", self.path.join(METRICS).display())
        })?;
        self.metrics_bytes += line.len() as u64;
        Ok(())
    }

    /// # Errors
    /// Where the file system refuses.
    pub fn add_time(&mut self, time: &impl Serialize) -> anyhow::Result<()> {
        let line = serde_json::to_string(time)? + "\n";
        let written = self.times.write_all(line.as_bytes());
        written.with_context(|| {
            format!("{}; make room and go on with --resume", self.path.join(TIMES).display())
        })
    }

    /// Length of the metrics, once they are on the disk.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn settle_metrics(&mut self) -> io::Result<u64> {
        self.metrics.sync_all()?;
        Ok(self.metrics_bytes)
    }

    /// # Errors
    /// Where the file system refuses.
    pub fn metrics(&self) -> anyhow::Result<String> {
        let file = self.path.join(METRICS);
        std::fs::read_to_string(&file).with_context(|| file.display().to_string())
    }

    pub fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}
