//! The tests' libcuda and libnvrtc (`tests/fake/`), and a process that finds them.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Exit status of `build.sh` where there is no compiler.
const NO_COMPILER: i32 = 3;

/// Runs the tests, one after the other, in a process that finds the libraries, which `marker` is set in. `what` is skipped
/// where they cannot be built.
pub fn run(marker: &str, what: &str, tests: &[(&str, fn())]) {
    if std::env::var_os(marker).is_none() {
        let folder = tempfile::tempdir().unwrap();
        return match build(folder.path()) {
            Ok(()) => again(folder.path(), marker),
            Err(reason) => println!("skipped: {what}: {reason}"),
        };
    }
    for (name, test) in tests {
        let began = Instant::now();
        test();
        println!("ok      {name} ({:.1} s)", began.elapsed().as_secs_f32());
    }
}

/// Builds both libraries into a folder; the reason where they cannot be built here.
pub fn build(folder: &Path) -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("the tests' libcuda is for Linux".to_owned());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/build.sh");
    let output = Command::new("sh").arg(script).arg(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.code() == Some(NO_COMPILER) {
        return Err(said);
    }
    assert!(output.status.success(), "{said}");
    Ok(())
}

/// This program again, which finds libraries in `folder` first; fails as it fails.
pub fn again(folder: &Path, marker: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    // The loader reads the variable when a process begins.
    let status = command.env("LD_LIBRARY_PATH", folder).env(marker, "1").status().unwrap();
    if !status.success() {
        println!("FAILED  {status}");
        std::process::exit(1);
    }
}

/// A count that the tests' libcuda keeps.
pub fn count(name: &str) -> u64 {
    // Safety: tests/fake/libcuda.cpp has these functions, without arguments.
    unsafe {
        let library = cudarc::driver::sys::culib();
        let count = library.get::<unsafe extern "C" fn() -> u64>(name.as_bytes()).unwrap();
        count()
    }
}
