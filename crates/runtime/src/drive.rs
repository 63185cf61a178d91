//! What turns an engine: a thread of its own, or a task of the runtime whose clock a simulation holds.
//!
//! An engine reads its inbox and computes, turn by turn, and sleeps when there is nothing to do. Both drivers run the
//! same turns; they differ in how one sleeps.

use std::{
    io,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    time::{sleep_until, timeout},
};

/// Who runs the turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Driver {
    /// A thread: a model computes for milliseconds, and would hold up every other task.
    #[default]
    Thread,
    /// A task, for models that only pretend to compute: in simulated time, one schedule is one order of tasks.
    Task,
}

/// An engine that is driven.
pub trait Turn: Send + 'static {
    type Command: Send;

    /// Handles what has come and takes a step.
    fn turn(&mut self, commands: &mut Commands<Self::Command>) -> Turned;

    /// How long it may sleep before its next turn when nothing comes.
    fn patience(&self) -> Duration;

    /// Until when its last step has taken, on the clock of its model.
    fn now(&self) -> Instant;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    /// There is more to do at once.
    Busy,
    Idle,
    /// It is over.
    Ended,
}

/// The way into an engine. It has no bound of its own: whoever has one says which protocol bounds it.
pub struct Inbox<C> {
    sender: mpsc::Sender<C>,
    arrived: Arc<Notify>,
}

/// What has come. It is closed when all ways in are gone and everything has been read.
pub struct Commands<C> {
    receiver: mpsc::Receiver<C>,
    arrived: Arc<Notify>,
    /// Read while waiting.
    first: Option<C>,
    is_closed: bool,
}

/// Turns an engine until it ends.
///
/// # Errors
/// When the operating system gives no thread.
pub fn drive<E: Turn>(
    driver: Driver,
    name: &str,
    mut engine: E,
    mut commands: Commands<E::Command>,
) -> io::Result<()> {
    match driver {
        Driver::Thread => {
            let turns = move || {
                loop {
                    match engine.turn(&mut commands) {
                        Turned::Busy => {}
                        Turned::Idle => commands.wait(engine.patience()),
                        Turned::Ended => return,
                    }
                }
            };
            thread::Builder::new().name(name.into()).spawn(turns)?;
        }
        Driver::Task => {
            tokio::spawn(async move {
                loop {
                    let turned = engine.turn(&mut commands);
                    sleep_until(engine.now().into()).await;
                    match turned {
                        Turned::Busy => {}
                        Turned::Idle => commands.arrival(engine.patience()).await,
                        Turned::Ended => return,
                    }
                }
            });
        }
    }
    Ok(())
}

pub fn inbox<C>() -> (Inbox<C>, Commands<C>) {
    let (sender, receiver) = mpsc::channel();
    let arrived = Arc::new(Notify::new());
    let commands = Commands { receiver, arrived: Arc::clone(&arrived), first: None, is_closed: false };
    (Inbox { sender, arrived }, commands)
}

// === impl Inbox ===

impl<C> Inbox<C> {
    /// # Errors
    /// When the engine has ended.
    pub fn send(&self, command: C) -> Result<(), mpsc::SendError<C>> {
        self.sender.send(command)?;
        self.arrived.notify_one();
        Ok(())
    }
}

impl<C> Clone for Inbox<C> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), arrived: Arc::clone(&self.arrived) }
    }
}

impl<C> Drop for Inbox<C> {
    fn drop(&mut self) {
        // The last one closes the inbox a moment later: a task that wakes now finds it open and looks again in time.
        self.arrived.notify_one();
    }
}

// === impl Commands ===

impl<C> Commands<C> {
    /// The next one, if it is here.
    pub fn take(&mut self) -> Option<C> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        match self.receiver.try_recv() {
            Ok(command) => Some(command),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(mpsc::TryRecvError::Disconnected) => {
                self.is_closed = true;
                None
            }
        }
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    fn wait(&mut self, patience: Duration) {
        match self.receiver.recv_timeout(patience) {
            Ok(command) => self.first = Some(command),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => self.is_closed = true,
        }
    }

    /// As `wait`, for a task. What arrived before is not missed: a notice is kept until someone waits for it.
    async fn arrival(&mut self, patience: Duration) {
        let _ = timeout(patience, self.arrived.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds up what it is sent, one number for each turn.
    struct Sum {
        total: u64,
        done: mpsc::Sender<u64>,
    }

    impl Turn for Sum {
        type Command = u64;

        fn turn(&mut self, commands: &mut Commands<u64>) -> Turned {
            match commands.take() {
                Some(number) => {
                    self.total += number;
                    Turned::Busy
                }
                None if commands.is_closed() => {
                    let _ = self.done.send(self.total);
                    Turned::Ended
                }
                None => Turned::Idle,
            }
        }

        fn patience(&self) -> Duration {
            Duration::from_millis(20)
        }

        fn now(&self) -> Instant {
            Instant::now()
        }
    }

    #[tokio::test]
    async fn both_drivers_miss_nothing_and_end_with_the_last_way_in() {
        for driver in [Driver::Thread, Driver::Task] {
            let (inbox, commands) = inbox();
            let (done, total) = mpsc::channel();
            drive(driver, "sum", Sum { total: 0, done }, commands).expect("a thread can be had");
            for number in 0..100 {
                inbox.clone().send(number).expect("the engine runs");
                tokio::task::yield_now().await;
            }
            drop(inbox);
            let total = tokio::task::spawn_blocking(move || total.recv_timeout(Duration::from_secs(10)));
            assert_eq!(total.await.expect("no panic"), Ok(4950), "{driver:?}");
        }
    }
}
