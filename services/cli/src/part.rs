//! A role as a process of its own: started, waited for, and stopped.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::bench::cores;

/// Loading a model of a few hundred megabytes on a slow disk.
pub const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// From SIGTERM to the end of a process that has nothing left to do.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A child process that said that it is ready; killed when it is dropped.
pub struct Part {
    role: &'static str,
    child: Child,
    /// `host:port`
    pub address: String,
}

// === impl Part ===

impl Part {
    /// Starts a role and waits until it is ready.
    pub async fn start(role: &'static str, flags: &[String]) -> anyhow::Result<Self> {
        Self::start_on(role, flags, None).await
    }

    /// The same on one core, where one is named.
    pub async fn start_on(role: &'static str, flags: &[String], core: Option<usize>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut command = Command::new(program);
        command
            .arg(role)
            .args(flags)
            .args(["--log-filter", "warn"])
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        // SAFETY: prctl(2) and sched_setaffinity(2) take plain numbers, and are allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                core.map_or(Ok(()), |core| cores::restrict(0, &[core]))?;
                die_with_parent()
            })
        };
        let mut child = command.spawn().with_context(|| format!("cannot start the {role} process"))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let mut lines = BufReader::new(stdout).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if let Some(address) = ready_address(&line) {
                    return anyhow::Ok(address.to_owned());
                }
            }
            bail!("the {role} process ended before it was ready")
        };
        let ready = timeout(READY_TIMEOUT, ready).await;
        let address = ready.with_context(|| format!("the {role} process was not ready in time"))??;
        Ok(Self { role, child, address })
    }

    pub fn id(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// SIGTERM, and a wait for its own end.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(id) = self.child.id() {
            // SAFETY: kill(2) takes plain numbers; the child has not been waited for, so its id is still its own.
            unsafe { libc::kill(id as libc::pid_t, libc::SIGTERM) };
        }
        let ended = timeout(STOP_TIMEOUT, self.child.wait()).await;
        let status = ended.with_context(|| format!("the {} process did not stop", self.role))??;
        if !status.success() {
            bail!("the {} process ended with {status}", self.role);
        }
        Ok(())
    }
}

/// An address that was free a moment ago, for a port that no ready line tells.
pub fn free_address() -> anyhow::Result<String> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// A killed parent can stop nobody, and nobody else would. Parts are started on the main thread, whose end is meant here.
fn die_with_parent() -> std::io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal's number.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The address in a ready line; a whole cluster's goes on with what it serves.
fn ready_address(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(" is ready at http://")?;
    Some(rest.split_once(": ").map_or(rest, |(address, _)| address).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_lines_of_roles_and_of_a_whole_cluster_name_their_address() {
        let role = "uniarm base is ready at http://127.0.0.1:7001";
        assert_eq!(ready_address(role), Some("127.0.0.1:7001"));
        let cluster = "uniarm is ready at http://127.0.0.1:7000: base smol, rewards positive (positive)";
        assert_eq!(ready_address(cluster), Some("127.0.0.1:7000"));
        assert_eq!(ready_address("loading"), None);
    }
}
