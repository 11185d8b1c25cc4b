//! When to leave a server that turned out to be a replica: at once, then at growing intervals. As long as there is no
//! primary, and for a server that stays a replica, the next connection leads to a replica as well.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest and the longest time between two connections that are replaced for this.
const PAUSES: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(2)];

/// The last connection that was replaced because it led to a replica.
#[derive(Default)]
pub(super) struct Demotion(Option<Replaced>);

struct Replaced {
    at: Instant,
    /// How many connections had been made before.
    made: u64,
    /// How long the next one is kept.
    pause: Duration,
}

impl Demotion {
    /// Returns whether to replace the connection, the last of so many that were made, now that it leads to a replica.
    pub(super) fn is_due(&mut self, made: u64) -> bool {
        let [shortest, longest] = PAUSES;
        let pause = match &self.0 {
            // What was requested is not there yet.
            Some(before) if before.made == made && before.at.elapsed() < longest => return false,
            Some(before) if before.at.elapsed() < before.pause => return false,
            Some(before) if before.at.elapsed() < longest * 2 => longest.min(before.pause * 2),
            _ => shortest,
        };
        self.0 = Some(Replaced { at: Instant::now(), made, pause });
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stays_a_replica_is_left_ever_more_seldom() {
        let (mut demotion, mut made) = (Demotion::default(), 1);
        let began = Instant::now();
        let mut left = Vec::new();
        while began.elapsed() < Duration::from_secs(8) {
            if demotion.is_due(made) {
                left.push(began.elapsed().as_millis());
                made += 1;
            }
            advance(Duration::from_millis(10)).await;
        }
        assert_eq!(left, [0, 250, 750, 1_750, 3_750, 5_750, 7_750]);
        // The next failover.
        advance(Duration::from_secs(60)).await;
        assert!(demotion.is_due(made));
        advance(Duration::from_millis(250)).await;
        assert!(demotion.is_due(made + 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_requested_is_waited_for() {
        let mut demotion = Demotion::default();
        assert!(demotion.is_due(1));
        advance(Duration::from_millis(1_900)).await;
        assert!(!demotion.is_due(1));
        advance(Duration::from_millis(100)).await;
        assert!(demotion.is_due(1), "it may have been lost");
    }
}
