//! What the HTTP front door of a router has besides its address.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{args::COUNT_MAX, batch::metrics::watch_batches, bounds, tls::DoorArgs};
use anyhow::{Context as _, bail};
use clap::Args;
use uniarm_batch::host::{Host, HostOptions, ShelfLimits};
use uniarm_router::{FrontOptions, Origin, RouterService, audit::Journal, tenants::Tenants};
use uniarm_runtime::Metrics;

/// A batch that is not done a day after its creation expires, as OpenAI has it.
const BATCH_WINDOW: Duration = Duration::from_secs(24 * 3600);

/// Requests of one batch in flight at most; the pace finds what the pools take below it.
const BATCH_IN_FLIGHT_MAX: usize = 256;

#[derive(Debug, Clone, Args)]
pub struct FrontArgs {
    #[command(flatten)]
    pub door: DoorArgs,
    /// File of tenants: API keys, limits and preference floors (docs/tenants.md); everybody may ask for everything without it
    #[arg(long, env = "UNIARM_TENANTS", value_name = "FILE")]
    pub tenants: Option<PathBuf>,
    /// Folder for records of requests that want one kept (docs/audit.md); without it such requests are refused
    #[arg(long, env = "UNIARM_AUDIT_DIR", value_name = "FOLDER")]
    pub audit_dir: Option<PathBuf>,
    /// Seconds that a client may leave its answer unread; then what it holds is given back, and it may ask for the rest
    #[arg(long, env = "UNIARM_CLIENT_STALL_TIMEOUT", value_name = "SECONDS", default_value_t = 60.0, value_parser = stall_timeout)]
    pub client_stall_timeout: f64,
    /// A site whose pages may use the HTTP front door, such as https://example.org, or * for all; repeatable; none without it
    #[arg(long, env = "UNIARM_HTTP_CORS", value_name = "ORIGIN", value_delimiter = ',')]
    pub http_cors: Vec<Origin>,
    /// Folder for the files and batches of /v1/files and /v1/batches; no such endpoints without it
    #[arg(long, env = "UNIARM_BATCH_DIR", value_name = "FOLDER")]
    pub batch_dir: Option<PathBuf>,
    /// Files in that folder; one more is refused
    #[arg(long, env = "UNIARM_BATCH_FILES_MAX", default_value_t = 1000, value_name = "N")]
    pub batch_files_max: usize,
    /// Bytes of all these files; what would be more is refused
    #[arg(long, env = "UNIARM_BATCH_BYTES_MAX", default_value_t = 10 << 30, value_name = "BYTES")]
    pub batch_bytes_max: u64,
    /// Batches under way at once; one more is refused
    #[arg(long, env = "UNIARM_BATCHES_MAX", default_value_t = 8, value_name = "N", value_parser = bounds::within(1..=COUNT_MAX))]
    pub batches_max: usize,
}

/// # Errors
/// When it is no number of seconds that anybody could mean.
fn stall_timeout(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    match (1.0..=86400.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("wants 1 to 86400 seconds".to_owned()),
    }
}

// === impl FrontArgs ===

impl FrontArgs {
    /// Who may ask.
    ///
    /// # Errors
    /// When the file cannot be used.
    pub fn open_tenants(&self) -> anyhow::Result<Tenants> {
        let Some(file) = &self.tenants else { return Ok(Tenants::default()) };
        Tenants::open(file).with_context(|| format!("--tenants {}", file.display()))
    }

    /// What can be said of its folders without making them.
    ///
    /// # Errors
    /// Names the flag of one that cannot be.
    pub fn check_folders(&self) -> anyhow::Result<()> {
        for (flag, folder) in [("--audit-dir", &self.audit_dir), ("--batch-dir", &self.batch_dir)] {
            let Some(folder) = folder else { continue };
            // One that is not there yet is made where its parents are.
            let there = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
            if !there.is_dir() {
                bail!("{flag} {}: {} is no folder", folder.display(), there.display());
            }
        }
        Ok(())
    }

    /// Where records of requests are kept.
    ///
    /// # Errors
    /// When the folder cannot be used, or what it holds is no chain of records.
    pub fn open_journal(&self, metrics: &Metrics) -> anyhow::Result<Option<Journal>> {
        Journal::open(self.audit_dir.as_deref(), metrics).context("--audit-dir")
    }

    /// How long a client may leave its answer unread.
    pub fn client_patience(&self) -> Duration {
        Duration::from_secs_f64(self.client_stall_timeout)
    }

    /// What the front door is made of.
    pub fn routes(&self, host: Option<Arc<Host>>) -> FrontOptions {
        FrontOptions { host, cors: self.http_cors.clone() }
    }

    /// The files and batches that a router keeps. `requests_max`: what it relays at once, half of which stays for those
    /// who wait for an answer.
    pub fn open_host(
        &self,
        service: &RouterService,
        requests_max: usize,
        metrics: &Metrics,
    ) -> anyhow::Result<Option<Arc<Host>>> {
        let Some(folder) = self.batch_dir.clone() else { return Ok(None) };
        let share = requests_max / 2 / self.batches_max;
        let options = HostOptions {
            folder,
            shelf: ShelfLimits { files_max: self.batch_files_max, bytes_max: self.batch_bytes_max },
            batches_max: self.batches_max,
            in_flight_max: share.clamp(1, BATCH_IN_FLIGHT_MAX),
            window: BATCH_WINDOW,
        };
        let host = Host::open(options, Arc::new(service.clone()))?;
        let counted = Arc::clone(&host);
        watch_batches(metrics, move || counted.tally());
        Ok(Some(host))
    }
}
