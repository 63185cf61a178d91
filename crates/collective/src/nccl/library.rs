//! libnccl: found when somebody first asks for it, and the few of its functions that a group needs.

use std::{
    error::Error as _,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

use libloading::Library as Shared;

use crate::CollectiveError;

pub(super) const ID_BYTES: usize = 128;

/// What a machine has that runs NCCL, and what one has that builds against it.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const DRIVER_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Results of NCCL's functions that mean something here.
pub(super) const SUCCESS: c_int = 0;
pub(super) const REMOTE_ERROR: c_int = 6;
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: NCCL only carries.
pub(super) const BYTES: c_int = 1;

/// By which the ranks of one group find each other: 128 bytes of NCCL's, an address of rank 0 among them. Whoever has it can
/// join the group.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NcclId([u8; ID_BYTES]);

/// A communicator, as NCCL knows it.
pub(super) type Raw = *mut c_void;

/// `ncclConfig_t` as of NCCL 2.14: whatever later versions added keeps their defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

type Transfer<Address> = unsafe extern "C" fn(Address, usize, c_int, c_int, Raw, *mut c_void) -> c_int;

/// NCCL's functions; results are plain numbers, since a later library may return one that is not known here.
pub(super) struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut NcclId) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Raw) -> *const c_char,
    pub(super) init_rank_config: unsafe extern "C" fn(*mut Raw, c_int, NcclId, c_int, *mut Config) -> c_int,
    pub(super) get_async_error: unsafe extern "C" fn(Raw, *mut c_int) -> c_int,
    pub(super) finalize: unsafe extern "C" fn(Raw) -> c_int,
    pub(super) destroy: unsafe extern "C" fn(Raw) -> c_int,
    pub(super) abort: unsafe extern "C" fn(Raw) -> c_int,
    pub(super) group_start: unsafe extern "C" fn() -> c_int,
    pub(super) group_end: unsafe extern "C" fn() -> c_int,
    pub(super) send: Transfer<*const c_void>,
    pub(super) recv: Transfer<*mut c_void>,
    /// Keeps the functions where they are.
    _shared: Shared,
}

/// libnccl, beside a driver that is there.
pub(super) fn library() -> Result<&'static Library, CollectiveError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        // Whoever finds libcuda missing later, panics.
        open(&DRIVER_NAMES, "NVIDIA's driver (nvidia-smi says whether it runs)")?;
        Library::new(open(&NAMES, "NCCL 2.18 or later (Debian: libnccl2; PyPI: nvidia-nccl-cu13)")?)
    });
    library.as_ref().map_err(|reason| CollectiveError::Device { reason: reason.clone() })
}

/// The first library of these names.
fn open(names: &[&str], package: &str) -> Result<Shared, String> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: what runs when it is loaded is NVIDIA's, which whoever put it on the loader's path trusts.
        match unsafe { Shared::new(*name) } {
            Ok(shared) => return Ok(shared),
            // The loader's own words are behind the library's.
            Err(error) => reasons.push(error.source().unwrap_or(&error).to_string()),
        }
    }
    Err(format!(
        "{} is not found: install {package}, or name its folder in LD_LIBRARY_PATH before the program starts; the \
         loader looks there, in ldconfig's cache and in the system's folders ({})",
        names[0],
        reasons.join("; ")
    ))
}

// === impl NcclId ===

impl NcclId {
    pub fn to_bytes(&self) -> [u8; ID_BYTES] {
        self.0
    }

    pub fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }
}

// === impl Config ===

impl Config {
    pub(super) fn non_blocking() -> Self {
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 2_14_00, blocking: 0 }
    }
}

// === impl Library ===

impl Library {
    fn new(shared: Shared) -> Result<Self, String> {
        /// One function, by its name.
        ///
        /// # Safety
        /// `F` is the function's type.
        unsafe fn find<F: Copy>(shared: &Shared, name: &str) -> Result<F, String> {
            let missing =
                |error| format!("libnccl has no {name}, and is older than 2.18, or is none: {error}");
            // SAFETY: the caller's.
            unsafe { shared.get::<F>(name.as_bytes()) }.map(|found| *found).map_err(missing)
        }
        // SAFETY: the types of the fields are those of nccl.h, which has not changed them since 2.18.
        unsafe {
            Ok(Self {
                get_version: find(&shared, "ncclGetVersion")?,
                get_unique_id: find(&shared, "ncclGetUniqueId")?,
                get_error_string: find(&shared, "ncclGetErrorString")?,
                get_last_error: find(&shared, "ncclGetLastError")?,
                init_rank_config: find(&shared, "ncclCommInitRankConfig")?,
                get_async_error: find(&shared, "ncclCommGetAsyncError")?,
                finalize: find(&shared, "ncclCommFinalize")?,
                destroy: find(&shared, "ncclCommDestroy")?,
                abort: find(&shared, "ncclCommAbort")?,
                group_start: find(&shared, "ncclGroupStart")?,
                group_end: find(&shared, "ncclGroupEnd")?,
                send: find(&shared, "ncclSend")?,
                recv: find(&shared, "ncclRecv")?,
                _shared: shared,
            })
        }
    }

    pub(super) fn version(&self) -> Result<u32, CollectiveError> {
        let mut version = 0;
        // SAFETY: there is room for the answer.
        let code = unsafe { (self.get_version)(&mut version) };
        if code != SUCCESS {
            return Err(CollectiveError::Device { reason: self.sentence(code, None) });
        }
        Ok(version.unsigned_abs())
    }

    pub(super) fn unique_id(&self) -> Result<NcclId, CollectiveError> {
        let mut id = NcclId([0; ID_BYTES]);
        // SAFETY: as above.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        if code != SUCCESS {
            return Err(CollectiveError::Device { reason: self.sentence(code, None) });
        }
        Ok(id)
    }

    /// What NCCL says about a result, and last about anything.
    pub(super) fn sentence(&self, code: c_int, raw: Option<Raw>) -> String {
        let text = |said: *const c_char| {
            if said.is_null() {
                return String::new();
            }
            // SAFETY: NCCL's sentences end with a zero, and stay where they are while its lock is held.
            unsafe { CStr::from_ptr(said) }.to_string_lossy().trim().to_owned()
        };
        // SAFETY: both take any number, and a communicator that lives or none.
        let (error, last) = unsafe {
            (
                text((self.get_error_string)(code)),
                text((self.get_last_error)(raw.unwrap_or(std::ptr::null_mut()))),
            )
        };
        match last.is_empty() {
            true => format!("NCCL says {error} ({code})"),
            false => format!("NCCL says {error} ({code}): {last}"),
        }
    }
}
