//! What a lock guarantees on each backend, on what that rests, and what it does not guarantee.
//!
//! Each row names tests that show it, as `cargo test` wants them: `it loss::NAME` is `cargo test --test it loss::NAME`,
//! and `lib hold::tests::NAME` is `cargo test --lib hold::tests::NAME`. Tests in `src` that need a server also need
//! `-- --ignored`. A row about what is *not* guaranteed names a test in which it happens. `tests/it/guarantees.rs`
//! checks that all of these tests exist, and `tests/mutants.sh` that tests notice when a safeguard is missing.
//!
//! No lock can stop code that never checks it, nor a request that is already on its way to a third system. So a store
//! that a late writer could harm has to compare [fencing tokens](crate::LockGuard::fencing_token).
//!
//! <style>
//! /* Names of tests are longer than a column is wide. */
//! .docblock td { vertical-align: top; }
//! .docblock td:last-child code { font-size: 0.8em; word-break: break-all; white-space: normal; }
//! </style>
//!
//! # Every backend
//!
//! Guards that use one [token](crate::LockRequest::token), chosen by the user, share a lock. They count as one holder
//! here.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | Of two holders, at most one sees its lock as held at any instant. | the backend keeps what it was told (below); clocks run at the same speed, within the [drift](crate::LockerBuilder::drift) | `lib simulation::no_history_has_two_holders_at_once_or_fencing_tokens_that_fall`, `lib simulation::universe::no_history_of_everything_breaks_a_promise`, `exclusion two_hundred_tasks_in_four_processes_never_hold_one_lock_together` |
//! | A guard ends before the server frees its key, whatever becomes of the server, the network or a reply. | clocks run at the same speed, within the drift | `lib hold::tests::a_confirmation_counts_from_its_send`, `lib simulation::a_hung_store_is_a_loss_at_the_deadline_to_the_millisecond`, `it loss::a_guard_is_lost_before_a_frozen_server_frees_its_key` |
//! | `is_held`, `check`, `lost` and `protect` are on time, even while no task of the crate runs. | | `it loss::is_held_flips_at_the_deadline_even_when_the_runtime_stands_still`, `lib loss::tests::a_loss_is_reported_while_the_runtime_of_the_guard_is_blocked` |
//! | A guard whose machine was suspended for too long is over when the machine wakes. | Linux, Android or Windows; the code checks | `lib hold::tests::a_lock_that_sleeps_with_its_machine_is_over_when_that_wakes` |
//! | A lock that is lost stays lost, for the reason that was found first. | | `lib hold::tests::the_first_reason_stays`, `lib hold::tests::a_confirmation_after_the_deadline_revives_nothing` |
//! | A server's clock may be set back: its keys live longer, and fencing tokens grow on. | it forgets nothing meanwhile; [quorum](#a-quorum): by less than the restart window | `it clocks::a_server_whose_clock_is_set_back_keeps_a_lock_that_is_held_and_its_fencing_tokens_grow_on` |
//! | A failure of the server or of the network ends no guard before its deadline. | | `it loss::a_renewal_whose_answer_is_lost_is_no_loss`, `it loss::a_connection_cut_again_and_again_loses_nothing` |
//! | "Another holds it" is always a reply of the server, never a failure. | | `it waiting::no_one_is_said_to_hold_a_lock_while_the_server_is_silent`, `lib mode::tests::a_reader_behind_one_that_got_no_reply_is_not_told_that_another_holds_the_key` |
//! | A reply counts only for the request that it belongs to. | | `it errors::the_reply_to_another_request_is_never_taken_for_an_answer` |
//! | An attempt that failed, or was dropped, leaves no lock behind, however late the server runs it. | the locker lives, or was [closed](crate::Locker::close); otherwise the ttl frees the key | `it late::an_attempt_that_failed_and_comes_late_leaves_nothing_however_late`, `it cancellation::an_attempt_that_the_server_runs_after_it_was_dropped_is_undone` |
//! | Any future may be dropped at any time. | | `many ten_thousand_requests_dropped_at_random_points_leave_no_key_and_no_task` |
//! | A guard that is dropped or expires ends its own grant, not what its token has obtained since. | | `it ownership::a_dropped_guard_does_not_end_what_its_token_obtains_next`, `it ownership::a_guard_that_expires_does_not_end_what_its_token_obtained_later` |
//! | A guard is renewed by no key that is there for another guard of its token alone. | its token was [chosen](crate::LockRequest::token), or read from [the guard](crate::LockGuard::token) | `it ownership::a_guard_whose_token_was_used_again_is_renewed_by_no_key_that_is_there_for_the_other_alone` |
//! | The output of work under [`protect`](crate::LockGuard::protect) is returned only if the lock was held to its end. | | `lib simulation::work_that_becomes_ready_with_the_loss_has_lost` |
//! | Fencing tokens grow from holder to holder. | what the backend says below | `lib simulation::no_history_has_two_holders_at_once_or_fencing_tokens_that_fall` |
//! | The waiters of one process are served in the order in which they came. | they poll their futures | `it waiting::who_waits_in_one_process_is_served_in_order` |
//! | An explicit release ends nothing that its token obtains after it has returned, also where its connection broke; nor what the same locker obtains by it after the future was dropped. | | `lib simulation::a_release_that_was_given_up_ends_nothing_that_its_token_obtains_after_that`, `it late::a_release_that_comes_late_ends_nothing_that_its_token_has_obtained_since`, `lib store::quorum::simulated::a_release_that_is_late_takes_nothing_from_who_comes_back_by_the_same_token` |
//! | A key stays taken for the time of [`hold_at_least`](crate::LockRequest::hold_at_least) after a release that the server has confirmed. | nothing forgets it; on a quorum, a majority replied to the first call | `lib simulation::bounds::of_several_keys_those_that_are_left_stay_taken_when_one_is_lost`, `lib store::quorum::simulated::what_is_taken_back_after_the_release_stays_taken_for_the_least_time` |
//! | Every call ends within its timeout, or waits because it was asked to. | | `it errors::a_hung_server_is_waited_for_no_longer_than_said`, `lib simulation::waiting_ends_within_fifty_milliseconds_of_its_limit_even_when_the_server_hangs` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | A server whose clock is set forward, by more than the drift, lets no second holder in. | keys expire early: there can be two holders until the first one's next renewal; fencing tokens tell them apart | `it clocks::a_server_whose_clock_is_set_forward_lets_a_second_holder_in_whose_fencing_token_is_greater` |
//! | Guards of one token exclude each other. | they share the lock, and an explicit [release](crate::LockGuard::release) ends it for all of them, unless the outcome of its first call is unknown | `it ownership::an_explicit_release_ends_the_lock_for_all_who_hold_it_by_its_token` |
//! | A lock is renewed while its runtime is blocked or gone. | it is lost by its deadline; [`isolated`](crate::LockerBuilder::isolated) gives renewals a thread of their own | `it drops::with_its_runtime_gone_the_guard_says_so_and_the_ttl_frees_the_lock`, `it drops::an_isolated_locker_renews_although_every_worker_is_blocked` |
//! | A guard that is dropped frees its key. | without a runtime, the ttl does | `it drops::with_its_runtime_gone_the_guard_says_so_and_the_ttl_frees_the_lock` |
//! | A waiter whose future is not polled keeps its turn. | it loses the turn | `it parked::a_future_that_is_not_polled_keeps_its_turn_from_nobody` |
//!
//! # The embedded store
//!
//! [`Locker::in_memory`](crate::Locker::in_memory): one process, and nothing that can fail.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | It decides as a server does. | | `it conformance::the_embedded_store_conforms`, `lib store::redis::alike::the_embedded_store_decides_and_leaves_what_a_server_does` |
//! | A waiter gets a lock whose holder is gone when its ttl ends. | | `lib simulation::a_dead_holder_is_followed_when_its_ttl_ends` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | Two embedded lockers exclude each other. | only clones of one locker do | `it guarantees::two_embedded_lockers_know_nothing_of_each_other` |
//!
//! # One server
//!
//! [`Locker::connect`](crate::Locker::connect) with a server that nobody replaces. The server keeps what it was told
//! unless it is restarted without its data, is flushed or evicts.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | Locks exclude those of other libraries, and are excluded by them. | these use `SET key token NX PX` on the same key | `it interop::redis_py_and_tenure_exclude_each_other` |
//! | A lock that the server has lost ends as [`Missing`](crate::Loss::Missing) or [`Taken`](crate::Loss::Taken) at the next renewal. | the server replies | `it loss::a_deleted_key_is_missing_at_the_next_renewal`, `it loss::an_overwritten_key_is_taken_and_left_to_its_new_owner` |
//! | Fencing tokens grow even if the server forgets everything. | its clock was not set back by more than the time for which it was away | `it loss::a_flush_loses_the_lock_and_fencing_tokens_grow_on`, `it loss::a_server_restarted_empty_has_lost_the_lock_but_its_fencing_tokens_grow_on` |
//! | A server that restarts with its data loses no lock. | it is back before the deadline | `watchdog a_server_that_is_killed_and_comes_back_with_its_data_loses_nothing` |
//! | A server that is out of memory still renews and releases. | | `it loss::a_server_out_of_memory_still_renews_and_releases` |
//! | Processes that wait have turns. | they may use the [line](crate::LockRequest::fair) | `turns processes_of_one_task_have_as_many_turns_each`, `it waiting::a_process_with_many_waiters_leaves_the_lock_to_others` |
//! | [Fair](crate::LockRequest::fair) requests are served in the order of their arrival at the server. | | `it waiting::fair_requests_are_served_in_the_order_of_their_arrival_in_whatever_process`, `turns fair_waiters_of_different_processes_keep_their_order` |
//! | A process that dies in the line costs the others a moment. | | `turns a_process_that_dies_in_the_line_costs_a_moment` |
//! | A waiter gets a lock whose holder has died when its ttl ends. | | `it waiting::a_waiter_finds_the_expiry_of_a_dead_holder` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | A server that forgets lets no second holder in. | there can be two holders until the first one's next renewal; fencing tokens tell them apart | `lib simulation::a_server_that_forgets_has_two_holders_at_once_or_the_histories_are_toothless`, `lib simulation::real::a_real_server_that_forgets_is_found_out_or_the_histories_are_toothless` |
//! | Waiters are notified of what other libraries release. | they look every second ([`poll_every`](crate::LockerBuilder::poll_every)) | `it waiting::what_another_library_releases_is_found_by_a_slow_look` |
//! | A lock that changes hands within its process is checked at the server each time. | the next renewal checks it; [`local_hand_over(false)`](crate::LockerBuilder::local_hand_over) | `lib acquire::take_over::tests::a_lock_that_the_server_has_lost_is_found_out_by_the_successor` |
//!
//! # One server with replicas, or under Sentinels
//!
//! As one server. A failover replaces it by a replica, which keeps what it has got.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | A lock that the replica has got stays held and exclusive through a failover. | that replica is promoted before the deadline, and its clock is not ahead of the old primary's by more than the drift | `it failover::a_lock_that_was_replicated_outlives_its_primary` |
//! | With [`min_replicas(n)`](crate::LockerBuilder::min_replicas), what is granted or renewed is on n replicas. | | `it replicas::what_is_held_is_on_the_replica`, `it replicas::one_replica_of_two_is_enough_for_one_and_not_for_two`, `it replicas::what_is_obtained_and_renewed_in_one_call_is_on_the_replica` |
//! | With `min_replicas`, a primary that is cut off from its replicas keeps no guard alive. | | `it replicas::a_guard_whose_replica_is_cut_off_is_lost_by_its_deadline_and_not_before` |
//! | A grant with too few replicas is given back. | | `it replicas::without_the_replica_a_request_says_how_many_acknowledged_and_leaves_nothing` |
//! | Guards and waiters follow a failover, also where nobody closes the connections to the old primary. | the address, or the Sentinels, lead to the new one; the connection is the crate's own, or reconnects by itself | `it errors::guards_find_the_new_primary_before_they_end`, `it errors::a_replica_is_left_for_the_primary_to_which_its_address_leads_now` |
//! | Fencing tokens grow through a failover. | the new primary's clock is not behind by more than the failover took | `it failover::a_lock_that_was_not_replicated_is_missing_and_fencing_tokens_grow_on` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | Without `min_replicas`, a lock outlives a failover. | it may be [`Missing`](crate::Loss::Missing) afterwards, and there can be two holders until its next renewal | `it failover::a_lock_that_was_not_replicated_is_missing_and_fencing_tokens_grow_on` |
//! | With fewer than all replicas in `min_replicas`, a failover forgets nothing. | one of the others may be promoted: `WAIT` is not consensus | `it failover::a_lock_that_was_not_replicated_is_missing_and_fencing_tokens_grow_on` |
//!
//! # A cluster
//!
//! As one server with replicas, for the slot of each key.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | A slot that moves keeps its locks held and exclusive. | | `topologies locks_in_a_slot_that_migrates_stay_held_and_exclusive` |
//! | A primary that is dead or frozen holds up no lock on the others. | | `topologies a_dead_primary_holds_up_no_lock_on_the_others`, `topologies nor_does_a_frozen_primary` |
//! | A lock that a replica has got stays exclusive through the death of its primary. | that replica is promoted | `topologies locks_that_a_replica_has_stay_exclusive_through_the_death_of_their_primary` |
//! | A forced failover ends guards by their deadlines, or they survive it. | | `topologies a_forced_failover_ends_guards_by_their_deadlines_or_is_survived_and_hangs_nothing` |
//! | Waiters hear of releases after their slot has moved. | Redis 7 or later, Valkey | `it listening::waiters_for_a_key_whose_slot_has_moved_listen_on_its_new_node` |
//! | All that is kept beside a key is in its slot. | | `lib store::redis::names::tests::derived_keys_are_in_the_slot_of_their_lock_key_whatever_braces_it_has` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | Keys of one request may be anywhere. | keys of different slots are refused as [`CrossSlot`](crate::Error::CrossSlot) | `it conformance::a_cluster_conforms` |
//! | A failover forgets nothing. | as with replicas | `topologies when_a_primary_of_a_cluster_dies_locks_on_the_others_are_kept_and_its_own_are_lost_or_kept_by_its_replica` |
//!
//! # A quorum
//!
//! [`Locker::quorum`](crate::Locker::quorum): a majority of independent servers. What each of them forgets matters only
//! together.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | One holder at a time, although nodes freeze, die and forget. | fewer than half of the nodes forget within one ttl; a node forgets only in a restart, or has a [restart window](crate::LockerBuilder::restart_window) of no less than the ttl behind it | `lib store::quorum::simulated::no_history_has_two_holders_at_once_or_fencing_tokens_that_fall`, `soak no_two_hold_a_lock_while_nodes_freeze_die_and_forget`, `model three_clients_that_renew` |
//! | A guard survives nodes that are away one after another, however many in all. | a majority replies to each renewal | `quorum a_guard_outlives_nodes_that_freeze_or_forget_one_after_another`, `soak no_guard_is_lost_while_nodes_are_away_one_after_another` |
//! | A node counts for a guard only where it has that guard's own grant, whatever other guards have its token. | | `quorum a_guard_counts_no_node_that_has_only_the_grant_of_another_guard_of_its_token`, `quorum a_guard_is_healed_where_only_another_guard_of_its_token_had_a_grant` |
//! | Without a majority, a guard is lost by its deadline. | | `quorum without_a_majority_a_guard_is_lost_by_its_deadline_and_requests_name_the_nodes` |
//! | A node that was restarted lately doesn't vote, and confirms no lease. | the window is on | `quorum a_node_that_was_restarted_does_not_vote_and_says_until_when`, `quorum a_lease_is_not_taken_up_by_what_a_restarted_node_remembers` |
//! | No ttl is longer than the restart window. | | `quorum a_ttl_longer_than_the_restart_window_is_refused` |
//! | Fencing tokens grow, whatever clients' clocks show. | the clock of a node that forgot was not set back by more than the time for which it was away; nodes' clocks differ by less than the window | `quorum fencing_tokens_grow_while_nodes_are_restarted_empty_one_after_the_other`, `lib store::quorum::restarted::fencing_tokens_grow_where_a_majority_comes_back_with_an_old_dump`, `lib store::quorum::simulated::clients_whose_clocks_are_hours_apart_take_turns` |
//! | What was granted on a minority is given back. | | `quorum a_failed_attempt_leaves_nothing_on_the_minority`, `lib store::quorum::simulated::no_history_leaves_a_key_on_a_node` |
//! | Slow and dead nodes hold up nothing. | the others are a majority | `quorum one_frozen_node_of_five_slows_nothing`, `quorum two_dead_nodes_of_five_are_done_without` |
//! | One server under two addresses has one vote. | the user may run `INFO` | `quorum one_server_by_two_names_makes_no_quorum`, `quorum one_server_by_two_names_that_comes_late_has_one_vote` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | Without the restart window, a node that forgets lets no second holder in. | there can be two holders | `lib store::quorum::simulated::without_the_restart_window_there_are_such_histories_or_they_are_toothless`, `model without_the_restart_window_a_node_votes_twice` |
//! | A lock survives the memory of a majority. | it is lost at the next renewal | `quorum a_guard_outlives_the_memory_of_a_minority_and_not_that_of_a_majority` |
//! | Waiters of different processes are served in order. | whoever asks first after a release gets the lock; contenders pause for random times | `quorum split_votes_resolve` |
//! | Nodes' clocks may differ by more than the restart window. | fencing tokens may fall | `model clocks_a_window_apart_are_too_far_apart` |
//!
//! # Readers and permits
//!
//! What is above also holds for each guard of [`Locker::read`](crate::Locker::read) and
//! [`Locker::permit`](crate::Locker::permit), except that some holders don't exclude each other. Readers are on every
//! backend, permits on all but a quorum.
//!
//! | guaranteed | as long as | shown by |
//! | --- | --- | --- |
//! | No lock is held beside a reader or a permit, nor readers beside permits; other libraries find the key taken. | as for locks | `lib store::redis::shared::tests::readers_share_a_key_that_excludes_all_others_until_the_last_has_left`, `it conformance::a_server_conforms`, `it conformance::the_embedded_store_conforms` |
//! | No more hold a permit than each request says. | as for locks; whoever dies gives its permit back when its ttl ends | `lib store::redis::shared::tests::there_are_as_many_permits_as_each_request_says`, `lib mode::tests::a_permit_comes_back_by_release_drop_and_ttl` |
//! | A share ends by its own ttl, whatever the others renew. | | `lib store::redis::shared::tests::a_share_ends_by_its_own_ttl_whatever_the_others_renew` |
//! | Shares that the server has kept from before the key was lost count for nothing. | | `lib store::redis::shared::tests::the_shares_of_an_earlier_marker_count_for_nothing` |
//! | A writer that waits gets in under a stream of readers. | it polls its future | `lib store::redis::shared::tests::no_share_is_taken_that_a_writer_waits_for`, `lib mode::tests::a_waiting_writer_holds_new_readers_back`, `it conformance::a_server_conforms`, `quorum a_writer_gets_in_under_a_stream_of_readers_also_with_a_node_frozen` |
//! | So does one that waits for several keys, of which one is read. | it polls its future | `lib mode::tests::one_that_waits_for_several_keys_gets_in_under_a_stream_of_readers`, `it conformance::a_server_conforms`, `it conformance::a_quorum_of_three_conforms` |
//! | A writer that waits and dies holds readers back for two seconds at most. | | `it sharing_line::a_writer_that_waits_and_dies_holds_readers_back_for_two_seconds_at_most` |
//! | A [downgrade](crate::LockGuard::downgrade) lets no writer in between. | | `lib store::redis::shared::tests::a_lock_becomes_a_share_in_one_step_and_keeps_all_it_has`, `lib store::quorum::simulated::sharing::a_lock_becomes_a_readers_share_on_every_node_and_no_writer_gets_in_between` |
//! | On a quorum, no writer is beside readers, although nodes freeze, die and forget. | as for locks | `lib store::quorum::simulated::sharing::no_history_has_a_writer_beside_others_or_its_fencing_token_out_of_order`, `quorum readers_and_writers_that_contend_never_hold_the_key_together` |
//! | With [`min_replicas`](crate::LockerBuilder::min_replicas), what is shared is on the replicas. | | `it replicas::what_is_shared_is_on_the_replica` |
//!
//! | not guaranteed | instead | shown by |
//! | --- | --- | --- |
//! | A request for several keys gets in although two of them have readers at any time. | it holds readers back at one key at a time, and waits for as long as they go on | `lib mode::tests::of_several_keys_a_reader_is_held_back_at_the_one_that_is_waited_for` |
//! | Permits exist on a quorum. | they are refused, with the reason | `lib store::quorum::simulated::sharing::a_quorum_has_no_permits_and_says_why` |
//! | A permit can be obtained even if the set of holders was deleted or evicted. | none is granted until the marker's ttl ends, as nobody knows who has the others | `lib store::redis::shared::tests::nobody_gets_a_permit_while_it_is_not_known_who_has_the_others` |
//! | Without the restart window, a node of a quorum that forgets lets no writer in beside readers. | a writer may be beside them | `lib store::quorum::simulated::sharing::without_the_restart_window_some_history_has_a_writer_beside_others` |
