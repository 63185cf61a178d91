//! For tests: a real etcd, one node that can be killed and started again on its data, and free ports.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Finds or fetches an etcd binary.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/etcd.sh");

/// Set to 1 where no etcd can be had: the tests that need one then pass without running.
const SKIP_VARIABLE: &str = "UNIARM_SKIP_ETCD";

const START_TIMEOUT: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(20);

/// Below those that Linux gives to outgoing connections, unless somebody has configured it.
const PORTS: Range<u16> = 20_000..32_768;

/// The ports are free when they are chosen, but another process may be quicker.
const START_ATTEMPTS: usize = 5;

/// One etcd node on loopback. It dies with this value.
pub struct EtcdServer {
    binary: PathBuf,
    folder: TempDir,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
    tls: Option<ServerFiles>,
}

/// What an etcd needs to speak TLS with clients that show a certificate; PEM files.
#[derive(Debug, Clone)]
pub struct ServerFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Who signed the clients' certificates.
    pub client_authority: PathBuf,
}

impl EtcdServer {
    /// A running node without data; `None` where `UNIARM_SKIP_ETCD=1` says so.
    ///
    /// # Panics
    /// When no etcd can be had or it does not start: a test that needs one has failed.
    #[must_use]
    pub fn start() -> Option<Self> {
        Self::start_with(None)
    }

    /// The same behind TLS.
    ///
    /// # Panics
    /// As [`EtcdServer::start`].
    #[must_use]
    pub fn start_with_tls(files: ServerFiles) -> Option<Self> {
        Self::start_with(Some(files))
    }

    fn start_with(tls: Option<ServerFiles>) -> Option<Self> {
        let mut server = Self::stopped()?;
        server.tls = tls;
        for _ in 0..START_ATTEMPTS {
            if server.try_start() {
                return Some(server);
            }
            (server.client_port, server.peer_port) = (free_port(), free_port());
        }
        panic!("etcd does not start:\n{}", server.log());
    }

    /// A node that is not running yet, but whose address is known.
    ///
    /// # Panics
    /// When no etcd can be had.
    #[must_use]
    pub fn stopped() -> Option<Self> {
        let binary = etcd_binary()?;
        let folder = tempfile::tempdir().expect("a folder for etcd's data can be made");
        let (client_port, peer_port) = (free_port(), free_port());
        Some(Self { binary, folder, client_port, peer_port, child: None, tls: None })
    }

    /// host:port
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// The store's address, as `--store` takes it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("etcd://{}", self.endpoint())
    }

    /// SIGKILL: nothing is flushed, nobody is told.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().and_then(|()| child.wait()).expect("a child of ours can be killed");
        }
    }

    /// Starts again at the same address on the same data.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "etcd is running");
        assert!(self.try_start(), "etcd does not start again:\n{}", self.log());
    }

    /// Throws the data of a killed node away, as a lost disk would.
    ///
    /// # Panics
    /// When it is running.
    pub fn lose_data(&mut self) {
        assert!(self.child.is_none(), "etcd is running");
        std::fs::remove_dir_all(self.data()).expect("etcd's data can be removed");
    }

    fn try_start(&mut self) -> bool {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let client = format!("{scheme}://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let log = File::create(self.folder.path().join("log")).expect("a log file can be made");
        let mut command = Command::new(&self.binary);
        if let Some(ServerFiles { certificate, key, client_authority }) = &self.tls {
            command.arg("--client-cert-auth").arg("--cert-file").arg(certificate).arg("--key-file").arg(key);
            command.arg("--trusted-ca-file").arg(client_authority);
        }
        let child = command
            .arg("--data-dir")
            .arg(self.data())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the binary was tried before");
        self.child = Some(child);
        let answers = self.wait_until_it_listens();
        if !answers {
            self.kill();
        }
        answers
    }

    fn wait_until_it_listens(&mut self) -> bool {
        let deadline = Instant::now() + START_TIMEOUT;
        while Instant::now() < deadline {
            let exited = self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if exited {
                return false;
            }
            if TcpStream::connect((Ipv4Addr::LOCALHOST, self.client_port)).is_ok() {
                return true;
            }
            std::thread::sleep(START_POLL);
        }
        false
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An etcd, found or fetched; `None` where `UNIARM_SKIP_ETCD=1` says so.
///
/// # Panics
/// When none can be had.
#[must_use]
pub fn etcd_binary() -> Option<PathBuf> {
    if std::env::var(SKIP_VARIABLE).is_ok_and(|value| value == "1") {
        eprintln!("skipped: {SKIP_VARIABLE}=1");
        return None;
    }
    let found = Command::new(SCRIPT).arg("path").stderr(Stdio::inherit()).output();
    let found = found.expect("scripts/etcd.sh can be run");
    assert!(found.status.success(), "no etcd; set {SKIP_VARIABLE}=1 to go without");
    Some(Path::new(String::from_utf8_lossy(&found.stdout).trim()).to_owned())
}

/// A loopback port that nobody listens on, that this process has not had before, and that the kernel gives to no
/// outgoing connection. Nothing reserves it.
///
/// # Panics
/// When every port is taken.
#[must_use]
pub fn free_port() -> u16 {
    static ASKED: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() as u16;
    (0..PORTS.len())
        .map(|_| {
            let port = first.wrapping_add(ASKED.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u16;
            PORTS.start + port
        })
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("loopback has free ports")
}
