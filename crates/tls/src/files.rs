//! What is made of files, and made anew when they change.

use std::{
    fmt,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// Why files cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("the certificates cannot be used: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("the authority cannot be used: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    #[error("{0:?} is no name of a host")]
    Host(String),
}

type Make<T> = dyn Fn() -> Result<T, TlsError> + Send + Sync;

/// A value made of files. Clones share it.
pub(crate) struct Rotating<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    paths: Vec<PathBuf>,
    make: Box<Make<T>>,
    held: Mutex<(Stamps, T)>,
}

/// What tells one state of the files from another. Kubernetes puts a new folder behind the same names: other inodes.
type Stamps = Vec<Option<(u64, i64, i64, u64)>>;

// === impl TlsError ===

impl TlsError {
    fn file(path: &Path, reason: impl fmt::Display) -> Self {
        Self::File { path: path.to_owned(), reason: reason.to_string() }
    }
}

// === impl Rotating ===

impl<T: Clone> Rotating<T> {
    pub(crate) fn new(
        paths: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Before: what changes while they are read is seen at the next look.
        let stamps = stamps(&paths);
        let made = make()?;
        let inner = Inner { paths, make: Box::new(make), held: Mutex::new((stamps, made)) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Of the files as they are. Those that cannot be used change nothing, and are logged once.
    pub(crate) fn current(&self) -> T {
        let Inner { paths, make, held } = &*self.inner;
        let now = stamps(paths);
        let mut held = held.lock();
        if held.0 != now {
            held.0 = now;
            match make() {
                Ok(made) => {
                    tracing::info!(file = %paths[0].display(), "certificates have changed");
                    held.1 = made;
                }
                Err(error) => tracing::error!(%error, "the certificates stay as they were"),
            }
        }
        held.1.clone()
    }
}

impl<T> Clone for Rotating<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<T> fmt::Debug for Rotating<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.inner.paths).finish()
    }
}

fn stamps(paths: &[PathBuf]) -> Stamps {
    let stamp = |path: &PathBuf| {
        let seen = std::fs::metadata(path).ok()?;
        Some((seen.ino(), seen.mtime(), seen.mtime_nsec(), seen.len()))
    };
    paths.iter().map(stamp).collect()
}

/// The certificates of a file, the process's own first.
pub(crate) fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| TlsError::file(path, error))?;
    let chain: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| TlsError::file(path, error))?;
    if chain.is_empty() {
        return Err(TlsError::file(path, "has no certificate: wants PEM"));
    }
    Ok(chain)
}

pub(crate) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::file(path, error))
}

/// The authorities of a file. Several, while one follows the other.
pub(crate) fn roots(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in chain(path)? {
        roots.add(authority).map_err(|error| TlsError::file(path, error))?;
    }
    Ok(Arc::new(roots))
}
