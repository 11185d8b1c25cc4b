//! A lock passes from one process to another without being free in between.
//!
//!     cargo run --example hand_over
//!
//! Anna obtains the lock, starts Ben with its lease, and exits. Ben adopts it, keeps it past its ttl, and releases it.
//! Carl, a third process, tries to get it all the while. This needs a server: the one that `REDIS_URL` names, or else
//! it starts its own redis-server, if that is installed.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tenure::{Error as LockError, Lease, Locker};
use tokio::time::sleep;

const KEY: &str = "hand-over";
const TTL: Duration = Duration::from_millis(1_500);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    match (args.next().as_deref(), env::var("REDIS_URL")) {
        (Some("anna"), Ok(url)) => anna(&url).await,
        (Some("ben"), Ok(url)) => ben(&url).await,
        (Some("carl"), Ok(url)) => carl(&url).await,
        (None, Ok(url)) => {
            println!("The lock is kept on the server that REDIS_URL names.\n");
            play(&url).await
        }
        (None, Err(_)) => {
            let Ok(server) = OwnServer::start().await else {
                println!("This needs a server: set REDIS_URL, or install redis-server.");
                return Ok(());
            };
            println!("REDIS_URL is not set: the lock is kept on a redis-server started for this.\n");
            play(&server.url).await
        }
        (Some(other), _) => Err(format!("unknown role `{other}`").into()),
    }
}

/// Starts Anna and Carl, and waits until Ben has released the lock.
async fn play(url: &str) -> Result<(), Box<dyn Error>> {
    let mut anna = start("anna", url, None)?;
    let locker = Locker::connect(url).await?;
    while locker.inspect(KEY).await?.is_none() {
        sleep(Duration::from_millis(10)).await;
    }
    let mut carl = start("carl", url, None)?;
    if !anna.wait()?.success() || !carl.wait()?.success() {
        return Err("somebody failed".into());
    }
    Ok(())
}

async fn anna(url: &str) -> Result<(), Box<dyn Error>> {
    let locker = Locker::connect(url).await?;
    let guard = locker.lock(KEY).ttl(TTL).await?;
    say(&format!("anna has the lock, fencing token {}", guard.fencing_token().unwrap_or_default()));
    sleep(Duration::from_millis(500)).await;
    // The guard is gone, and the lock stays held.
    let lease = guard.into_lease();
    start("ben", url, Some(&lease))?;
    say("anna has started ben with the lease, and exits");
    Ok(())
}

async fn ben(url: &str) -> Result<(), Box<dyn Error>> {
    let locker = Locker::connect(url).await?;
    let lease: Lease = env::var("LEASE")?.parse()?;
    let guard = locker.adopt(lease).await?;
    say(&format!("ben has adopted it, fencing token {} as before", guard.fencing_token().unwrap_or_default()));
    guard.protect(sleep(TTL * 2)).await?;
    say("ben has worked for twice its ttl: it was renewed, and is released now");
    guard.release().await?;
    Ok(())
}

async fn carl(url: &str) -> Result<(), Box<dyn Error>> {
    let locker = Locker::connect(url).await?;
    let (start, mut refused) = (Instant::now(), 0);
    say("carl tries to get it every 20 ms");
    loop {
        match locker.try_lock(KEY).await {
            Err(LockError::NotObtained { .. }) => refused += 1,
            guard => {
                let (guard, seconds) = (guard?, start.elapsed().as_secs_f32());
                let fence = guard.fencing_token().unwrap_or_default();
                say(&format!("carl has it after {refused} refusals in {seconds:.1} s; greater fencing token {fence}"));
                return Ok(guard.release().await?);
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Starts this program again in a role.
fn start(role: &str, url: &str, lease: Option<&Lease>) -> Result<Child, Box<dyn Error>> {
    let mut command = Command::new(env::current_exe()?);
    command.arg(role).env("REDIS_URL", url);
    if let Some(lease) = lease {
        command.env("LEASE", lease.to_string());
    }
    Ok(command.spawn()?)
}

/// Prints a line with the time and the id of the process.
fn say(what: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    println!("{:>2}.{:03} s  [process {}] {what}", now.as_secs() % 60, now.subsec_millis(), std::process::id());
}

/// A redis-server for this example.
struct OwnServer {
    process: Child,
    socket: PathBuf,
    url: String,
}

impl OwnServer {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let socket = env::temp_dir().join(format!("tenure-hand-over-{}.sock", std::process::id()));
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket);
        let process = command.stdout(std::process::Stdio::null()).spawn()?;
        let url = format!("redis+unix://{}", socket.display());
        let server = Self { process, socket, url };
        for _ in 0..200 {
            if Locker::connect(&server.url).await.is_ok() {
                return Ok(server);
            }
            sleep(Duration::from_millis(10)).await;
        }
        Err("redis-server did not start".into())
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let ended = self.process.kill().and_then(|()| self.process.wait());
        if let Err(error) = ended.and_then(|_| std::fs::remove_file(&self.socket)) {
            eprintln!("could not clean up after redis-server: {error}");
        }
    }
}
