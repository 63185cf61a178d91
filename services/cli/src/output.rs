//! Standard output and standard error, either of which may be closed or full: the macros that print, in place of std's,
//! which panic there.

use std::{
    fmt,
    io::{self, Write as _},
    process,
    sync::atomic::{AtomicBool, Ordering},
};

/// Whether the work goes on where nobody reads what is said of it.
static WORKS_UNREAD: AtomicBool = AtomicBool::new(false);

macro_rules! print {
    ($($words:tt)*) => { $crate::output::say(format_args!($($words)*)) };
}

macro_rules! println {
    () => { $crate::output::say(format_args!("\n")) };
    ($($words:tt)*) => { $crate::output::say(format_args!("{}\n", format_args!($($words)*))) };
}

macro_rules! eprint {
    ($($words:tt)*) => { $crate::output::note(format_args!($($words)*)) };
}

macro_rules! eprintln {
    () => { $crate::output::note(format_args!("\n")) };
    ($($words:tt)*) => { $crate::output::note(format_args!("{}\n", format_args!($($words)*))) };
}

/// From here on nothing that cannot be said ends this process: of servers and long jobs, the work matters, not the words.
pub fn work_unread() {
    WORKS_UNREAD.store(true, Ordering::Relaxed);
}

/// What `print!` does.
pub fn say(words: fmt::Arguments<'_>) {
    said(io::stdout().write_fmt(words));
}

/// The same for a whole page.
pub fn say_bytes(bytes: &[u8]) {
    said(io::stdout().write_all(bytes));
}

/// Has a line that is not at its end be read; at the end of a command, the last one.
pub fn flush() {
    said(io::stdout().flush());
}

/// What `eprint!` does. Nowhere is left to say that standard error takes nothing.
pub fn note(words: fmt::Arguments<'_>) {
    let _ = io::stderr().write_fmt(words);
}

/// Ends a command whose result nobody can read: quietly behind `| head`, whose reader has what it wants.
fn said(result: io::Result<()>) {
    let Err(error) = result else { return };
    if WORKS_UNREAD.load(Ordering::Relaxed) {
        return;
    }
    if error.kind() == io::ErrorKind::BrokenPipe {
        process::exit(0);
    }
    note(format_args!("error: cannot write to standard output: {error}\n"));
    process::exit(1);
}
