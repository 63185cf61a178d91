//! A network in virtual time: connections whose bytes are late, are held back, or never arrive.
//!
//! A connection is as TCP makes it: bytes arrive once and in order. Between connections nothing is in order, because each
//! message has a delay of its own.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::Future as _,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, mpsc},
    time::{Instant, Sleep, sleep, sleep_until},
};
use uniarm_proto::client::{Dialer, Wire};

/// Bytes under way in one direction of a connection before its writer has to wait.
const UNDER_WAY_BYTES_MAX: usize = 256 << 10;

/// The delay of a message on a link that nothing is wrong with. The clock has a resolution of one millisecond.
const DELAY_MS: std::ops::RangeInclusive<u64> = 1..=3;

/// All hosts and their connections.
#[derive(Clone)]
pub struct Network {
    state: Arc<Mutex<State>>,
    healed: Arc<Notify>,
}

/// How a host goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Its process ends: the operating system tells all peers.
    Killed,
    /// It loses power: nobody is told.
    Vanished,
}

struct State {
    random: StdRng,
    listening: BTreeMap<String, mpsc::UnboundedSender<io::Result<Socket>>>,
    vanished: BTreeSet<String>,
    /// Directions in which nothing passes, and how many faults hold them.
    blocked: BTreeMap<(String, String), u32>,
    /// Directions in which a message may take so many milliseconds longer.
    slow: BTreeMap<(String, String), u64>,
    pipes: Vec<Arc<Mutex<Pipe>>>,
    began: Instant,
    trace: DefaultHasher,
}

/// One direction of a connection.
struct Pipe {
    from: String,
    to: String,
    /// Each message with the time of its arrival.
    under_way: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    is_blocked: bool,
    end: Option<End>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its writer has closed it: what is under way arrives, then the end.
    Closed,
    /// It broke: reading and writing fail at once.
    Reset,
    /// Its writer is no more: nothing arrives, and nobody says so.
    Silent,
    /// Its reader is no more: what is written is lost, and nobody says so.
    Lost,
}

/// One end of a connection.
pub struct Socket {
    network: Network,
    incoming: Arc<Mutex<Pipe>>,
    outgoing: Arc<Mutex<Pipe>>,
    arrival: Pin<Box<Sleep>>,
}

// === impl Network ===

impl Network {
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: StdRng::seed_from_u64(seed),
            listening: BTreeMap::new(),
            vanished: BTreeSet::new(),
            blocked: BTreeMap::new(),
            slow: BTreeMap::new(),
            pipes: Vec::new(),
            began: Instant::now(),
            trace: DefaultHasher::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), healed: Arc::default() }
    }

    /// Connections to this host, from now on until it goes down.
    pub fn listen(&self, host: &str) -> mpsc::UnboundedReceiver<io::Result<Socket>> {
        let (sender, connections) = mpsc::unbounded_channel();
        let mut state = self.lock();
        state.vanished.remove(host);
        state.listening.insert(host.to_owned(), sender);
        connections
    }

    /// Nobody new is let in.
    pub fn close(&self, host: &str) {
        self.lock().listening.remove(host);
    }

    /// How this host reaches the others.
    pub fn dialer(&self, from: &str) -> Dialer {
        let (network, from) = (self.clone(), from.to_owned());
        Dialer::over(move |to| {
            let (network, from) = (network.clone(), from.clone());
            let to = to.split(':').next().unwrap_or(to).to_owned();
            Box::pin(async move { network.dial(&from, &to).await })
        })
    }

    async fn dial(&self, from: &str, to: &str) -> io::Result<Box<dyn Wire>> {
        let there = self.lock().delay(from, to);
        let back = self.lock().delay(to, from);
        sleep(there + back).await;
        if self.lock().is_unreachable(from, to) {
            std::future::pending::<()>().await; // until the dialler loses patience
        }
        let mut state = self.lock();
        let Some(listening) = state.listening.get(to).cloned() else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let (there, back) = (state.pipe(from, to), state.pipe(to, from));
        state.note(from, to, 0);
        drop(state);
        let socket = |incoming: &Arc<Mutex<Pipe>>, outgoing: &Arc<Mutex<Pipe>>| Socket {
            network: self.clone(),
            incoming: Arc::clone(incoming),
            outgoing: Arc::clone(outgoing),
            arrival: Box::pin(sleep_until(Instant::now())),
        };
        let accepted = listening.send(Ok(socket(&there, &back)));
        accepted.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(Box::new(socket(&back, &there)))
    }

    /// The host's connections end, and it takes no more.
    pub fn take_down(&self, host: &str, down: Down) {
        let mut state = self.lock();
        state.listening.remove(host);
        if down == Down::Vanished {
            state.vanished.insert(host.to_owned());
        }
        for pipe in &state.pipes {
            let mut pipe = lock(pipe);
            match down {
                // Whoever read it is gone, whatever became of its writer.
                Down::Killed if pipe.to == host => pipe.end = Some(End::Reset),
                Down::Killed if pipe.from == host => pipe.finish(End::Reset),
                Down::Vanished if pipe.to == host => pipe.finish(End::Lost),
                Down::Vanished if pipe.from == host => pipe.finish(End::Silent),
                _ => continue,
            }
            pipe.wake();
        }
    }

    /// From here on nothing passes in this direction, until as many `heal` it.
    pub fn block(&self, from: &str, to: &str) {
        let mut state = self.lock();
        *state.blocked.entry((from.to_owned(), to.to_owned())).or_default() += 1;
        state.apply_blocks();
    }

    /// What was held back arrives now.
    pub fn heal(&self, from: &str, to: &str) {
        let mut state = self.lock();
        let link = (from.to_owned(), to.to_owned());
        if let Some(count) = state.blocked.get_mut(&link) {
            *count -= 1;
            if *count == 0 {
                state.blocked.remove(&link);
            }
        }
        state.apply_blocks();
        self.healed.notify_waiters();
    }

    /// Returns when a message that is sent now has arrived.
    pub async fn passage(&self, from: &str, to: &str) {
        loop {
            let healed = self.healed.notified();
            if !self.lock().is_blocked(from, to) {
                break;
            }
            healed.await;
        }
        let delay = self.lock().delay(from, to);
        sleep(delay).await;
    }

    pub fn set_slow(&self, from: &str, to: &str, milliseconds: u64) {
        self.lock().slow.insert((from.to_owned(), to.to_owned()), milliseconds);
    }

    /// A number that two runs share only if messages of the same lengths went the same ways at the same times.
    pub fn trace(&self) -> u64 {
        self.lock().trace.finish()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl State ===

impl State {
    fn delay(&mut self, from: &str, to: &str) -> Duration {
        let extra = self.slow.get(&(from.to_owned(), to.to_owned())).copied().unwrap_or(0);
        let extra = self.random.random_range(0..=extra);
        Duration::from_millis(self.random.random_range(DELAY_MS) + extra)
    }

    fn is_blocked(&self, from: &str, to: &str) -> bool {
        self.blocked.contains_key(&(from.to_owned(), to.to_owned()))
    }

    fn is_unreachable(&self, from: &str, to: &str) -> bool {
        self.vanished.contains(to) || self.is_blocked(from, to) || self.is_blocked(to, from)
    }

    fn pipe(&mut self, from: &str, to: &str) -> Arc<Mutex<Pipe>> {
        self.pipes.retain(|pipe| Arc::strong_count(pipe) > 1);
        let pipe = Arc::new(Mutex::new(Pipe {
            from: from.to_owned(),
            to: to.to_owned(),
            under_way: VecDeque::new(),
            bytes: 0,
            is_blocked: self.is_blocked(from, to),
            end: None,
            reader: None,
            writer: None,
        }));
        self.pipes.push(Arc::clone(&pipe));
        pipe
    }

    fn apply_blocks(&mut self) {
        for pipe in &self.pipes {
            let mut pipe = lock(pipe);
            let is_blocked = self.is_blocked(&pipe.from, &pipe.to);
            if pipe.is_blocked && !is_blocked {
                pipe.wake();
            }
            pipe.is_blocked = is_blocked;
        }
    }

    fn note(&mut self, from: &str, to: &str, bytes: usize) {
        (self.began.elapsed(), from, to, bytes).hash(&mut self.trace);
    }
}

// === impl Pipe ===

impl Pipe {
    fn finish(&mut self, end: End) {
        if self.end.is_none_or(|known| known == End::Closed) {
            self.end = Some(end);
            self.wake();
        }
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

// === impl Socket ===

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let incoming = Arc::clone(&self.incoming);
        let mut pipe = lock(&incoming);
        if matches!(pipe.end, Some(End::Reset | End::Lost)) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        pipe.reader = Some(context.waker().clone());
        if pipe.is_blocked || pipe.end == Some(End::Silent) {
            return Poll::Pending;
        }
        match pipe.under_way.front().map(|(at, _)| *at) {
            None if pipe.end == Some(End::Closed) => Poll::Ready(Ok(())),
            None => Poll::Pending,
            Some(at) if Instant::now() < at => {
                self.arrival.as_mut().reset(at);
                // Polled to be woken: it cannot be over yet.
                let _ = self.arrival.as_mut().poll(context);
                Poll::Pending
            }
            Some(_) => {
                let (at, mut message) = pipe.under_way.pop_front().expect("it was just looked at");
                let rest = message.split_off(message.len().min(buffer.remaining()));
                buffer.put_slice(&message);
                pipe.bytes -= message.len();
                if !rest.is_empty() {
                    pipe.under_way.push_front((at, rest));
                }
                pipe.writer.take().into_iter().for_each(Waker::wake);
                self.network.lock().note(&pipe.from, &pipe.to, message.len());
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.outgoing);
        match pipe.end {
            Some(End::Reset) => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Some(End::Closed) => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            Some(End::Lost) => return Poll::Ready(Ok(bytes.len())),
            Some(End::Silent) | None => {}
        }
        if pipe.bytes >= UNDER_WAY_BYTES_MAX {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let delay = self.network.lock().delay(&pipe.from, &pipe.to);
        let arrival = Instant::now() + delay;
        // Nothing arrives before what was sent earlier.
        let arrival = pipe.under_way.back().map_or(arrival, |(latest, _)| arrival.max(*latest));
        pipe.under_way.push_back((arrival, bytes.to_vec()));
        pipe.bytes += bytes.len();
        pipe.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.outgoing).finish(End::Closed);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    /// As an operating system closes it: what was sent still arrives, what comes meets nobody.
    fn drop(&mut self) {
        lock(&self.outgoing).finish(End::Closed);
        let mut incoming = lock(&self.incoming);
        incoming.under_way.clear();
        incoming.bytes = 0;
        incoming.finish(End::Reset);
    }
}
