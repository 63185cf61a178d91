//! A real etcd for tests.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::{free_address, repository};

/// A real etcd with its data in a temporary folder.
pub struct Etcd {
    child: Child,
    pub address: String,
    peer: String,
    data: tempfile::TempDir,
}

impl Etcd {
    pub fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (address, peer) = (free_address(), free_address());
        let child = spawn(data.path(), &address, &peer);
        Self { child, address, peer, data }
    }

    /// Ends it at once; its data stay.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, at its address and with its data.
    pub fn restart(&mut self) {
        self.child = spawn(self.data.path(), &self.address, &self.peer);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(data: &Path, address: &str, peer: &str) -> Child {
    let child = Command::new(program())
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &format!("http://{address}")])
        .args(["--advertise-client-urls", &format!("http://{address}")])
        .args(["--listen-peer-urls", &format!("http://{peer}")])
        .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
        .args(["--initial-cluster", &format!("default=http://{peer}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while std::net::TcpStream::connect(address).is_err() {
        assert!(began.elapsed() < Duration::from_secs(20), "etcd does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

fn program() -> PathBuf {
    let script = repository().join("scripts/etcd.sh");
    let output = Command::new("sh").arg(script).arg("path").stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "no etcd can be had");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}
