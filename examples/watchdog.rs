//! A worker that owns a changing set of shards, and a server that goes away and comes back.
//!
//!     cargo run --example watchdog
//!
//! The locks are kept on the server that `REDIS_URL` names, or else on the embedded store. The second part needs a
//! server that it may kill: it starts its own redis-server, if that is installed. That server writes every command to a
//! file, which a server needs to do if its locks are to survive its restart.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tenure::{Lease, Locker, Token, WatchDog, WatchEvent};
use tokio::time::sleep;

const TTL: Duration = Duration::from_secs(6);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let locker = match env::var("REDIS_URL") {
        Ok(url) => {
            println!("The locks are kept on the server that REDIS_URL names.\n");
            Locker::connect(&url).await?
        }
        Err(_) => {
            println!("REDIS_URL is not set: the locks are kept on the embedded store.\n");
            Locker::in_memory()
        }
    };
    a_changing_set(&locker).await?;

    println!();
    match OwnServer::start().await {
        Ok(mut server) => a_server_restarts(&mut server).await,
        Err(_) => {
            println!("redis-server could not be started: the second part is left out.");
            Ok(())
        }
    }
}

/// Shards come and go, and the worker takes one over from another.
async fn a_changing_set(locker: &Locker) -> Result<(), Box<dyn Error>> {
    let say = Clock::start();
    let dog = WatchDog::builder(locker).on_event(move |event| say.event(event)).build();

    say.line("this worker obtains shards 1 to 3, another has shard 4");
    for shard in 1..=3 {
        dog.watch(locker.lock(format!("shard:{shard}")).ttl(TTL).await?)?;
    }
    let other = locker.lock("shard:4").ttl(TTL).await?;

    say.line("its watchdog waits for shard 4, and it gives shard 2 back");
    let lease = Lease::new("shard:4", Token::random(), TTL);
    dog.watch_lease(lease).obtain_when_free(true).await?;
    dog.release("shard:2").await?;

    say.line("the other worker is done with shard 4");
    other.release().await?;
    until(|| dog.status("shard:4").is_some_and(|status| status.held)).await;

    sleep(Duration::from_millis(2_500)).await;
    say.line(&format!("it owns {} shards, and releases them all", dog.len()));
    for (key, error) in dog.release_all().await {
        say.line(&format!("{key} could not be released: {error}"));
    }
    dog.delivered().await;
    Ok(())
}

/// The server is killed in the middle of the work, and is back before the locks are lost.
async fn a_server_restarts(server: &mut OwnServer) -> Result<(), Box<dyn Error>> {
    let say = Clock::start();
    let locker = Locker::builder().command_timeout(Duration::from_millis(500)).connect(&server.url).await?;
    let dog = WatchDog::builder(&locker).on_event(move |event| say.event(event)).build();
    say.line("three shards, on a redis-server started for this");
    for shard in 1..=3 {
        dog.watch(locker.lock(format!("shard:{shard}")).ttl(TTL).await?)?;
    }

    server.kill()?;
    say.line("the server is killed");
    let failing = |shard: &str| dog.status(shard).is_some_and(|status| status.last_error.is_some());
    until(|| ["shard:1", "shard:2", "shard:3"].into_iter().all(failing)).await;
    say.line(&format!("all renewals have failed, and {} of 3 locks are still held", held(&dog)));

    server.spawn()?;
    say.line("the server is started again, with the data that it had");
    until(|| !["shard:1", "shard:2", "shard:3"].into_iter().any(failing)).await;
    dog.delivered().await;
    say.line(&format!("{} of 3 locks were held all the while", held(&dog)));

    drop(dog);
    locker.close().await;
    say.line("the watchdog is dropped: its locks are released");
    Ok(())
}

fn held(dog: &WatchDog) -> usize {
    (1..=3).filter(|shard| dog.status(format!("shard:{shard}")).is_some_and(|status| status.held)).count()
}

async fn until(done: impl Fn() -> bool) {
    while !done() {
        sleep(Duration::from_millis(10)).await;
    }
}

/// Prints lines with the time since the start.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn line(self, what: &str) {
        println!("{:>4.1} s  {what}", self.0.elapsed().as_secs_f32());
    }

    fn event(self, event: &WatchEvent) {
        let key = event.key();
        self.line(&match event {
            WatchEvent::Obtained { .. } => format!("    {key}: obtained"),
            WatchEvent::Renewed { count: 1, .. } => format!("    {key}: renewed"),
            WatchEvent::Renewed { count, .. } => format!("    {key}: renewed {count} times"),
            WatchEvent::RenewFailed { remaining, .. } => {
                format!("    {key}: could not be renewed, held for {:.1} s more", remaining.as_secs_f32())
            }
            WatchEvent::Lost { loss, .. } => format!("    {key}: LOST, {loss}"),
            WatchEvent::Released { .. } => format!("    {key}: released"),
            _ => format!("    {key}: no longer watched"),
        });
    }
}

/// A redis-server for this example, which writes every command to a file before it replies.
struct OwnServer {
    process: Child,
    dir: PathBuf,
    url: String,
}

impl OwnServer {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let dir = env::temp_dir().join(format!("tenure-watchdog-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let url = format!("redis+unix://{}", dir.join("socket").display());
        let process = spawn(&dir).inspect_err(|_| drop(std::fs::remove_dir_all(&dir)))?;
        let server = Self { process, dir, url };
        for _ in 0..200 {
            if Locker::connect(&server.url).await.is_ok() {
                return Ok(server);
            }
            sleep(Duration::from_millis(10)).await;
        }
        Err("redis-server did not start".into())
    }

    /// Kills the server, as a power cut would.
    fn kill(&mut self) -> std::io::Result<()> {
        self.process.kill()?;
        self.process.wait().map(drop)
    }

    fn spawn(&mut self) -> std::io::Result<()> {
        self.process = spawn(&self.dir)?;
        Ok(())
    }
}

fn spawn(dir: &Path) -> std::io::Result<Child> {
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--unixsocket"]).arg(dir.join("socket")).arg("--dir").arg(dir);
    command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]).stdout(Stdio::null()).spawn()
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let ended = self.kill();
        if let Err(error) = ended.and_then(|()| std::fs::remove_dir_all(&self.dir)) {
            eprintln!("could not clean up after redis-server: {error}");
        }
    }
}
