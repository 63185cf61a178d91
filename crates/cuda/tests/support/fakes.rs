//! The tests' libcuda and libnvrtc (`tests/fake/`), and a process that finds them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where g++ compiles for this machine, the kernels' fmaf is an instruction; nothing else may be fused.
const OPTIONS: [&str; 9] = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    // It takes a jump to another fiber for a damaged stack.
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-shared",
    "-pthread",
];

/// Builds both libraries into a folder; the reason where they cannot be built here.
pub fn build(folder: &Path) -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("the tests' libcuda is for Linux".to_owned());
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        return Err(format!("no C++ compiler '{compiler}' for the tests' libcuda"));
    }
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fake");
    for (library, files) in [
        ("libcuda.so", &["kernels.cpp", "fibers.cpp", "libcuda.cpp"][..]),
        ("libnvrtc.so", &["libnvrtc.cpp"][..]),
    ] {
        let mut command = Command::new(&compiler);
        command.args(OPTIONS).arg("-o").arg(folder.join(library));
        command.args(files.iter().map(|file| sources.join(file)));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{library}: {}", String::from_utf8_lossy(&output.stderr));
    }
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
