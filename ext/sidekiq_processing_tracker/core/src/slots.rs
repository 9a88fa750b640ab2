//! The blocking claims of this process: each waits in Redis for a job of one queue (docs/protocol.md, "Blocking claims").
//! Plain data, no threads.

use crate::crew::Crew;
use crate::entry::Token;
use crate::registry::Handle;
use crate::scripts::{Closing, Hand};
use std::sync::Arc;
use std::time::Instant;

/// How many there are at most. Each has a thread and a connection.
pub const MOST: usize = 8;
/// The connections that a process has beside these, Sidekiq's own among them: together they should be fewer than stock Sidekiq's, one
/// more than its threads. Another one is told of jobs, where a queue has no slot.
const OTHERS: usize = 2;
/// The indexes of their tokens begin here: no turn has so many jobs.
const FIRST_INDEX: u64 = 1 << 32;

/// What a thread of a slot is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Connect.
    Connect,
    /// Record what was brought into this hand, under this index.
    Take(Hand, u64),
    /// The same, if anything was, and claim the next job.
    Claim(Hand, Option<u64>),
}

/// A connection, as long as there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// What Redis calls it.
    pub id: i64,
    /// Which server it leads to.
    pub visit: u64,
}

/// A job that is in a hand, and not recorded yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brought {
    /// For its token.
    pub index: u64,
    /// What the process calls it.
    pub handle: Handle,
}

#[derive(Debug)]
struct Slot {
    crew: usize,
    queue: Arc<[u8]>,
    /// It is to connect.
    called: bool,
    client: Option<Client>,
    /// The hand of its connection, of the last one where there is none.
    hand: Option<u64>,
    /// Claims have been made into it.
    used: bool,
    brought: Option<Brought>,
    /// Hands that were used on connections before, and are not closed yet.
    old: Vec<(u64, Option<Brought>)>,
    /// A claim is outstanding.
    outstanding: bool,
    /// That claim is not wanted any more.
    unwanted: bool,
    /// Nor is it waited for: its connection leads elsewhere, or nowhere. It ends by itself.
    ignored: bool,
    /// The lease that its hand belongs to is lost.
    lost: bool,
    /// It is to open another hand, so as to close those before it.
    reopens: bool,
    /// It has failed, and makes no claim before.
    rests_until: Option<Instant>,
}

impl Slot {
    fn new(crew: usize, queue: Arc<[u8]>) -> Self {
        Self {
            crew,
            queue,
            called: false,
            client: None,
            hand: None,
            used: false,
            brought: None,
            old: Vec::new(),
            outstanding: false,
            unwanted: false,
            ignored: false,
            lost: false,
            reopens: false,
            rests_until: None,
        }
    }

    /// No claim is outstanding any more.
    fn end(&mut self) {
        (self.outstanding, self.unwanted, self.ignored) = (false, false, false);
        self.part();
    }

    /// With a lease that is lost goes its hand, when nothing is left to do for it. Its connection gets another one.
    fn part(&mut self) {
        if self.outstanding || self.brought.is_some() {
            return;
        }
        if self.lost {
            (self.lost, self.hand, self.used, self.client) = (false, None, false, None);
        }
        if std::mem::take(&mut self.reopens) {
            self.client = None;
        }
    }

    /// The jobs that are in its hands, each with the number of the hand.
    fn in_hand(&self) -> impl Iterator<Item = (u64, Brought)> + '_ {
        let old = self.old.iter().filter_map(|(hand, brought)| Some((*hand, (*brought)?)));
        self.hand.zip(self.brought).into_iter().chain(old)
    }

    /// Whether it has a hand without a connection: something may be in it that nobody has heard of.
    fn owes(&self) -> bool {
        self.client.is_none() && (self.used || !self.old.is_empty())
    }
}

/// The slots of all crews.
#[derive(Debug, Default)]
pub struct Slots {
    slots: Vec<Slot>,
    /// How many jobs have been brought, and how many hands there have been.
    brought: u64,
    hands: u64,
}

impl Slots {
    /// Makes slots for the queues of this crew, as long as there may be more.
    pub fn add(&mut self, number: usize, crew: &Crew, dice: &mut fastrand::Rng) {
        // What one process has no claim for, another of many has.
        let mut queues = crew.plan.likeliest(MOST / 2, dice);
        if let [queue] = &queues[..] {
            // While one claim is made anew, the next job may come.
            queues.push(queue.clone());
        }
        for queue in queues {
            if self.slots.len() < MOST {
                self.slots.push(Slot::new(number, queue));
            }
        }
    }

    fn of(&self, crew: usize) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |slot| slot.crew == crew)
    }

    fn outstanding_of(&self, crew: usize) -> usize {
        let counts = |slot: &&Slot| slot.outstanding && !slot.ignored;
        self.of(crew).filter(counts).count()
    }

    /// How many claims a crew whose threads wait for queues that are empty may have outstanding: one thread is left for turns, where
    /// there is another.
    fn most_for(crew: &Crew) -> usize {
        if crew.is_idle() {
            crew.wanted().saturating_sub(1).max(1)
        } else {
            0
        }
    }

    /// How many of its slots should have a connection.
    fn connections_for(&self, number: usize, crew: &Crew) -> usize {
        let most = crew.wanted().saturating_sub(OTHERS);
        let has_slot = |queue: &Arc<[u8]>| self.of(number).any(|slot| slot.queue == *queue);
        let is_enough = crew.plan.count() <= most && crew.plan.queues().all(has_slot);
        most.saturating_sub(usize::from(!is_enough)).max(1)
    }

    fn connected_of(&self, crew: usize) -> usize {
        self.of(crew)
            .filter(|slot| slot.called || slot.client.is_some())
            .count()
    }

    /// Makes the claims that should be made. Answers the slots that have something to do now.
    pub fn post(&mut self, crews: &[Crew], now: Instant) -> Vec<usize> {
        let mut busy = Vec::new();
        for (number, crew) in crews.iter().enumerate() {
            let mut left = Self::most_for(crew).saturating_sub(self.outstanding_of(number));
            let mut to_connect = self
                .connections_for(number, crew)
                .saturating_sub(self.connected_of(number));
            for at in 0..self.slots.len() {
                let slot = &mut self.slots[at];
                let rests = slot.rests_until.is_some_and(|until| now < until);
                if slot.crew != number || slot.outstanding || rests || left == 0 {
                    continue;
                }
                if slot.client.is_some() {
                    left -= 1;
                    slot.outstanding = true;
                    busy.push(at);
                } else if to_connect > 0 && !std::mem::replace(&mut slot.called, true) {
                    left -= 1;
                    to_connect -= 1;
                    busy.push(at);
                }
            }
        }
        busy
    }

    /// Calls the slots that are to connect though nobody waits for their jobs: what is in their hands is to be recorded, or to go back.
    /// Answers them.
    pub fn owing(&mut self, now: Instant) -> Vec<usize> {
        let mut busy = Vec::new();
        for (at, slot) in self.slots.iter_mut().enumerate() {
            let rests = slot.rests_until.is_some_and(|until| now < until);
            if slot.owes() && !rests && !std::mem::replace(&mut slot.called, true) {
                busy.push(at);
            }
        }
        busy
    }

    /// Whether this slot is to connect though nobody waits for its jobs.
    #[must_use]
    pub fn owes(&self, slot: usize) -> bool {
        self.slots.get(slot).is_some_and(Slot::owes)
    }

    /// When a slot that rests now will have rested.
    #[must_use]
    pub fn posts_at(&self, now: Instant) -> Option<Instant> {
        let ends = self.slots.iter().filter_map(|slot| slot.rests_until);
        ends.filter(|until| *until > now).min()
    }

    /// Whether Redis gives a job of this queue to this crew as soon as it has one. `is_current`: whether a visit leads to the
    /// server that is in use.
    #[must_use]
    pub fn covers(&self, crew: usize, queue: &[u8], is_current: impl Fn(u64) -> bool) -> bool {
        self.of(crew).any(|slot| {
            *slot.queue == *queue
                && slot.outstanding
                && !slot.unwanted
                && !slot.ignored
                && slot.client.is_some_and(|client| is_current(client.visit))
        })
    }

    /// Tells the crews how many of their claims are outstanding.
    pub fn count_for(&self, crews: &mut [Crew]) {
        for (number, crew) in crews.iter_mut().enumerate() {
            crew.blocked = self.outstanding_of(number);
        }
    }

    /// The connections whose claims are not wanted any more (`Crew::surplus_claims`).
    pub fn unwanted(&mut self, crews: &[Crew]) -> Vec<Client> {
        for (number, crew) in crews.iter().enumerate() {
            let mut surplus = crew.surplus_claims();
            let mine = self.slots.iter_mut().rev().filter(|slot| slot.crew == number);
            for slot in mine.filter(|slot| slot.outstanding && !slot.ignored) {
                // Those of the likeliest queues last.
                if surplus > 0 || slot.unwanted {
                    slot.unwanted = true;
                    surplus = surplus.saturating_sub(1);
                }
            }
        }
        let unwanted = self.slots.iter().filter(|slot| slot.unwanted && !slot.ignored);
        unwanted.filter_map(|slot| slot.client).collect()
    }

    /// Waits no more for the claims on these connections.
    pub fn ignore(&mut self, which: impl Fn(Client) -> bool) {
        for slot in &mut self.slots {
            slot.ignored |= slot.outstanding && slot.client.is_some_and(&which);
        }
    }

    /// None of the claims is wanted any more.
    pub fn withdraw(&mut self) {
        for slot in &mut self.slots {
            slot.unwanted = slot.outstanding;
        }
    }

    /// The lease is lost, and all hands with it.
    pub fn lose(&mut self) {
        self.withdraw();
        for slot in &mut self.slots {
            (slot.lost, slot.reopens) = (true, false);
            slot.old.clear();
            if slot.client.is_none() {
                slot.brought = None;
            }
            slot.part();
        }
    }

    /// Redis has these hands, each of a queue. Those of which no slot knows, since Redis has lost that they were closed, are to be closed
    /// again, like all that could not be so far.
    pub fn reopen(&mut self, hands: Vec<(u64, Vec<u8>)>) {
        for (number, queue) in hands {
            let knows = |slot: &Slot| slot.hand == Some(number) || slot.old.iter().any(|(old, _)| *old == number);
            if !self.slots.iter().any(knows) {
                let slot = self.slots.iter_mut().find(|slot| *slot.queue == *queue);
                slot.into_iter().for_each(|slot| slot.old.push((number, None)));
            }
        }
        for slot in self.slots.iter_mut().filter(|slot| !slot.old.is_empty()) {
            slot.reopens = slot.client.is_some();
            slot.part();
        }
    }

    /// What a slot is to do now.
    pub fn order(&mut self, slot: usize) -> Option<Order> {
        let slot = self.slots.get_mut(slot)?;
        if slot.unwanted {
            // Not sent yet.
            slot.end();
        }
        let hand = slot.client.and(slot.hand).map(|number| Hand {
            number,
            queue: slot.queue.clone(),
        });
        let index = slot.brought.map(|brought| brought.index);
        match (hand, index) {
            (Some(hand), _) if slot.outstanding => {
                slot.used = true;
                Some(Order::Claim(hand, index))
            }
            (Some(hand), Some(index)) => Some(Order::Take(hand, index)),
            _ => slot.called.then_some(Order::Connect),
        }
    }

    /// A slot has a new connection. Answers the hand that is to be opened for it; those that are to be closed are its old ones.
    pub fn renew(&mut self, slot: usize) -> Option<Hand> {
        let slot = self.slots.get_mut(slot)?;
        if slot.used {
            slot.old.extend(slot.hand.take().map(|hand| (hand, slot.brought)));
        }
        let number = *slot.hand.get_or_insert_with(|| {
            self.hands += 1;
            self.hands
        });
        (slot.used, slot.brought) = (false, None);
        Some(Hand {
            number,
            queue: slot.queue.clone(),
        })
    }

    /// The old hands of a slot, and what is known to be in them.
    pub fn old(&self, slot: usize) -> impl Iterator<Item = (u64, Option<Brought>)> + '_ {
        self.slots
            .get(slot)
            .into_iter()
            .flat_map(|slot| slot.old.iter().copied())
    }

    /// A slot has closed its old hands. Answers the jobs that it had there, with their tokens.
    pub fn closed(&mut self, slot: usize, closings: Vec<Closing>) -> Vec<(Handle, Option<Token>)> {
        let mut ended = Vec::new();
        let Some(slot) = self.slots.get_mut(slot) else {
            return ended;
        };
        let count = closings.len().min(slot.old.len());
        let old: Vec<_> = slot.old.drain(..count).collect();
        for ((number, brought), closing) in old.into_iter().zip(closings) {
            ended.extend(brought.map(|brought| (brought.handle, closing.token)));
            if !closing.closed {
                slot.old.push((number, None));
            }
        }
        ended
    }

    /// A slot has a connection.
    pub fn connected(&mut self, slot: usize, client: Client) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.called = false;
            slot.client = Some(client);
            slot.rests_until = None;
        }
    }

    /// A slot has lost its connection, or has none yet. It is not asked for anything before then.
    pub fn failed(&mut self, slot: usize, rests_until: Option<Instant>) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.called = false;
            slot.client = None;
            if slot.lost {
                slot.brought = None;
            }
            slot.end();
            slot.rests_until = rests_until;
        }
    }

    /// A slot has a connection, but Redis refuses its claims.
    pub fn rests(&mut self, slot: usize, until: Instant) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.end();
            slot.rests_until = Some(until);
        }
    }

    /// The claim of a slot is answered. Answers its crew.
    pub fn answered(&mut self, slot: usize) -> Option<usize> {
        let slot = self.slots.get_mut(slot)?;
        slot.end();
        Some(slot.crew)
    }

    /// A claim has brought this job. Answers whether its crew has another that is not recorded yet.
    pub fn brought(&mut self, slot: usize, handle: Handle) -> bool {
        let has_others = self
            .crew_of(slot)
            .is_some_and(|crew| self.of(crew).any(|slot| slot.brought.is_some()));
        self.brought += 1;
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.brought = Some(Brought {
                index: FIRST_INDEX + self.brought,
                handle,
            });
        }
        has_others
    }

    /// What a slot had in its hand is recorded, or is gone. Answers the job.
    pub fn took(&mut self, slot: usize) -> Option<Handle> {
        let slot = self.slots.get_mut(slot)?;
        let brought = slot.brought.take();
        slot.part();
        brought.map(|brought| brought.handle)
    }

    /// A slot whose claim was answered makes the next one at once, if its crew still wants one and the claim before was not
    /// taken back. Answers whether it does.
    pub fn claim_again(&mut self, slot: usize, crews: &[Crew]) -> bool {
        let Some((number, true)) = self.slots.get(slot).map(|slot| (slot.crew, slot.client.is_some())) else {
            return false;
        };
        let most = crews.get(number).map_or(0, Self::most_for);
        let again = self.outstanding_of(number) < most;
        if again {
            self.slots[slot].outstanding = true;
        }
        again
    }

    /// Whether a record with this name may be that of a job of which this process has no token yet.
    #[must_use]
    pub fn may_hold(&self, token: &Token) -> bool {
        let mut in_hand = self.slots.iter().flat_map(Slot::in_hand);
        in_hand.any(|(_, brought)| brought.index == token.index())
    }

    /// Whether there are such jobs.
    #[must_use]
    pub fn have_brought(&self) -> bool {
        self.slots.iter().any(|slot| slot.in_hand().next().is_some())
    }

    /// These jobs, each with its hand.
    pub fn in_hand(&self) -> impl Iterator<Item = (Hand, Brought)> + '_ {
        self.slots.iter().flat_map(|slot| {
            slot.in_hand().map(|(number, brought)| {
                let queue = slot.queue.clone();
                (Hand { number, queue }, brought)
            })
        })
    }

    /// The hands for which no claim can be on its way.
    pub fn quiet(&self) -> impl Iterator<Item = u64> + '_ {
        let quiet = self
            .slots
            .iter()
            .filter(|slot| slot.client.is_some() && !slot.outstanding);
        quiet.filter_map(|slot| slot.hand)
    }

    /// Whether a claim of this slot is outstanding.
    #[must_use]
    pub fn is_outstanding_at(&self, slot: usize) -> bool {
        self.slots.get(slot).is_some_and(|slot| slot.outstanding)
    }

    /// Whose claims a slot makes.
    #[must_use]
    pub fn crew_of(&self, slot: usize) -> Option<usize> {
        self.slots.get(slot).map(|slot| slot.crew)
    }

    /// From where its jobs come.
    #[must_use]
    pub fn queue_of(&self, slot: usize) -> Option<&[u8]> {
        self.slots.get(slot).map(|slot| &*slot.queue)
    }

    /// How many slots there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crew::Plan;
    use crate::parker::Parker;

    const HERE: Client = Client { id: 7, visit: 1 };

    fn crew(queues: &[&str], threads: usize) -> Crew {
        let plan = Plan::new(queues.iter().map(|queue| queue.as_bytes().to_vec()), false);
        let mut crew = Crew::new(plan);
        (0..threads).for_each(|_| crew.wait(Parker::new()));
        crew.dry = true;
        crew
    }

    /// Slots of a crew, all connected.
    fn connected(crew: &Crew) -> Slots {
        let mut slots = Slots::default();
        slots.add(0, crew, &mut fastrand::Rng::with_seed(1));
        for slot in 0..slots.count() {
            connect(&mut slots, slot);
        }
        slots
    }

    /// Answers the number of its hand, and the hands to close.
    fn connect(slots: &mut Slots, slot: usize) -> (u64, Vec<(u64, Option<u64>)>) {
        let hand = slots.renew(slot).unwrap();
        let old = slots
            .old(slot)
            .map(|(number, brought)| (number, brought.map(|brought| brought.index)));
        let old = old.collect();
        slots.connected(slot, HERE);
        (hand.number, old)
    }

    fn token(index: u64) -> Token {
        Token::read(format!("3-{index} 1700000000000 a").into_bytes()).unwrap()
    }

    #[test]
    fn the_likeliest_queues_come_first_and_there_are_not_too_many() {
        let crew = crew(&["a", "b", "b", "c", "c", "c"], 4);
        let mut slots = Slots::default();
        slots.add(0, &crew, &mut fastrand::Rng::with_seed(1));
        assert_eq!(slots.count(), 3);
        let crews = [crew];
        assert_eq!(slots.post(&crews, Instant::now()), [0]);
        assert_eq!(slots.post(&crews, Instant::now()), [0_usize; 0]);
        assert_eq!(slots.order(0), Some(Order::Connect));
        assert_eq!(connect(&mut slots, 0), (1, vec![]));
        assert_eq!(slots.order(0), None);
        assert_eq!(slots.post(&crews, Instant::now()), [0]);
        let hand = Hand {
            number: 1,
            queue: Arc::from(&b"c"[..]),
        };
        assert_eq!(slots.order(0), Some(Order::Claim(hand, None)));
        assert!(slots.covers(0, b"c", |visit| visit == 1));
        assert!(!slots.covers(0, b"c", |visit| visit == 2));
        assert!(!slots.covers(0, b"b", |_| true));
    }

    #[test]
    fn a_crew_that_has_found_something_makes_no_claims_that_wait() {
        let mut crew = crew(&["a"], 10);
        let mut slots = connected(&crew);
        crew.dry = false;
        let crews = [crew];
        assert!(slots.post(&crews, Instant::now()).is_empty());
        assert!(!slots.claim_again(0, &crews));
    }

    #[test]
    fn no_more_claims_than_threads_that_wait() {
        let crew = crew(&["a", "b"], 6);
        let mut slots = connected(&crew);
        let mut crews = [crew];
        assert_eq!(slots.post(&crews, Instant::now()), [0, 1]);
        slots.count_for(&mut crews);
        assert_eq!((crews[0].wanted(), crews[0].wanted_now()), (6, 4));
        assert!(slots.unwanted(&crews).is_empty());
        crews[0].claimed = 5;
        assert_eq!(slots.unwanted(&crews), [HERE]);
        // Until it is answered it is to be taken back.
        crews[0].claimed = 0;
        assert_eq!(slots.unwanted(&crews), [HERE]);
        assert!(!slots.covers(0, b"b", |_| true));
        assert!(slots.covers(0, b"a", |_| true));
        assert_eq!(slots.answered(1), Some(0));
        assert!(slots.unwanted(&crews).is_empty());
        assert!(slots.claim_again(1, &crews));
    }

    #[test]
    fn where_the_queues_have_something_the_last_threads_are_free_for_turns() {
        let crew = crew(&["a", "b"], 2);
        let mut slots = connected(&crew);
        let mut crews = [crew];
        assert_eq!(slots.post(&crews, Instant::now()), [0]);
        slots.count_for(&mut crews);
        crews[0].dry = false;
        assert!(crews[0].is_hungry());
        assert!(slots.unwanted(&crews).is_empty());
        crews[0].claimed = 1;
        assert!(!crews[0].is_hungry());
        assert_eq!(slots.unwanted(&crews), [HERE]);
        // Its connection leads nowhere.
        slots.ignore(|client| client == HERE);
        slots.count_for(&mut crews);
        assert!(crews[0].is_hungry());
        assert!(slots.unwanted(&crews).is_empty());
    }

    #[test]
    fn one_that_is_taken_back_before_it_is_sent_is_not_sent() {
        let crew = crew(&["a"], 5);
        let mut slots = connected(&crew);
        let crews = [crew];
        slots.post(&crews, Instant::now());
        slots.withdraw();
        assert!(slots.is_outstanding_at(0));
        assert_eq!(slots.order(0), None);
        assert!(!slots.is_outstanding_at(0));
    }

    #[test]
    fn a_single_queue_has_two_claims_where_there_are_threads_enough() {
        for (threads, most) in [(1, 1), (3, 1), (4, 2), (25, 2)] {
            let crew = crew(&["a"], threads);
            let mut slots = Slots::default();
            slots.add(0, &crew, &mut fastrand::Rng::with_seed(1));
            assert_eq!(slots.count(), 2);
            assert_eq!(slots.post(&[crew], Instant::now()).len(), most, "{threads} threads");
        }
    }

    #[test]
    fn where_not_each_queue_can_have_one_a_connection_is_left_for_the_others() {
        for (queues, threads, connections) in [(8, 10, 8), (9, 10, 7), (9, 25, 8), (3, 5, 3), (4, 5, 2), (2, 1, 1)] {
            // The first has a weight.
            let names: Vec<String> = (0..queues).chain([0, 0]).map(|queue| queue.to_string()).collect();
            let crew = crew(&names.iter().map(String::as_str).collect::<Vec<_>>(), threads);
            let mut slots = Slots::default();
            slots.add(0, &crew, &mut fastrand::Rng::with_seed(1));
            let posted = slots.post(&[crew], Instant::now()).len();
            assert_eq!(posted, connections, "{queues} queues, {threads} threads");
        }
    }

    #[test]
    fn a_second_crew_may_find_too_few_slots() {
        let crews = ["abcde", "fghij"]
            .map(|names| crew(&names.split("").filter(|name| !name.is_empty()).collect::<Vec<_>>(), 10));
        let mut slots = Slots::default();
        for (number, crew) in crews.iter().enumerate() {
            slots.add(number, crew, &mut fastrand::Rng::with_seed(1));
        }
        assert_eq!(
            (slots.connections_for(0, &crews[0]), slots.connections_for(1, &crews[1])),
            (8, 7)
        );
        assert_eq!(slots.post(&crews, Instant::now()).len(), MOST);
    }

    #[test]
    fn one_that_has_failed_rests() {
        let crew = crew(&["a"], 6);
        let mut slots = connected(&crew);
        let crews = [crew];
        let now = Instant::now();
        let later = now + std::time::Duration::from_secs(5);
        slots.post(&crews, now);
        slots.failed(0, Some(later));
        assert!(slots.post(&crews, now).is_empty());
        assert_eq!(slots.posts_at(now), Some(later));
        // Nobody need look again for one that has rested: it may not be wanted.
        assert_eq!(slots.posts_at(later), None);
        assert_eq!(slots.post(&crews, later), [0]);
        assert_eq!(slots.order(0), Some(Order::Connect));
    }

    #[test]
    fn what_is_brought_is_recorded_with_the_next_claim_or_without() {
        let crew = crew(&["a"], 5);
        let mut slots = connected(&crew);
        let crews = [crew];
        slots.post(&crews, Instant::now());
        slots.order(0);
        assert_eq!(slots.answered(0), Some(0));
        assert!(!slots.brought(0, 7));
        let index = FIRST_INDEX + 1;
        assert!(slots.have_brought() && slots.may_hold(&token(index)) && !slots.may_hold(&token(index + 1)));
        assert!(matches!(slots.order(0), Some(Order::Take(_, known)) if known == index));
        assert!(slots.claim_again(0, &crews));
        assert!(matches!(slots.order(0), Some(Order::Claim(_, Some(known))) if known == index));
        assert_eq!(slots.took(0), Some(7));
        assert!(!slots.have_brought());
        assert!(matches!(slots.order(0), Some(Order::Claim(_, None))));
        // Another slot of the crew has brought one: there may be more.
        slots.brought(1, 8);
        assert!(slots.brought(0, 9));
    }

    #[test]
    fn a_slot_that_has_lost_its_connection_closes_its_hand_on_the_next_one() {
        let crew = crew(&["a"], 5);
        let mut slots = connected(&crew);
        let now = Instant::now();
        let crews = [crew];
        assert_eq!(slots.quiet().collect::<Vec<_>>(), [1, 2]);
        // One that was never used needs no closing.
        slots.failed(1, None);
        assert!(slots.owing(now).is_empty());
        slots.post(&crews, now);
        slots.order(0);
        slots.answered(0);
        slots.brought(0, 7);
        let later = now + std::time::Duration::from_secs(5);
        slots.failed(0, Some(later));
        assert!(slots.quiet().next().is_none() && slots.have_brought() && slots.may_hold(&token(FIRST_INDEX + 1)));
        assert!(slots.owing(now).is_empty());
        assert_eq!((slots.owing(later), slots.owing(later)), (vec![0], vec![]));
        assert_eq!(slots.order(0), Some(Order::Connect));
        // It fails at once, before the old hand is closed.
        assert_eq!(slots.renew(0).unwrap().number, 3);
        slots.failed(0, None);
        assert_eq!(slots.owing(later), [0]);
        assert_eq!(connect(&mut slots, 0), (3, vec![(1, Some(FIRST_INDEX + 1))]));
        let closing = |token, closed| Closing { token, closed };
        let index = FIRST_INDEX + 1;
        assert_eq!(
            slots.closed(0, vec![closing(Some(token(index)), false)]),
            [(7, Some(token(index)))]
        );
        assert!(!slots.have_brought() && slots.owing(later).is_empty());
        // What could not be closed is tried again with each sweep, and so is what Redis has though it was closed.
        slots.reopen(vec![
            (3, b"a".to_vec()),
            (1, b"a".to_vec()),
            (9, b"a".to_vec()),
            (10, b"b".to_vec()),
        ]);
        assert_eq!(slots.owing(later), [0]);
        assert_eq!(connect(&mut slots, 0), (3, vec![(1, None), (9, None)]));
        assert_eq!(
            slots.closed(0, vec![closing(None, true), closing(None, true)]),
            [(7, None); 0]
        );
        slots.reopen(vec![(3, b"a".to_vec())]);
        assert_eq!(slots.owing(later), [0_usize; 0]);
    }

    #[test]
    fn a_lost_lease_takes_the_hands_along() {
        let crew = crew(&["a"], 6);
        let mut slots = connected(&crew);
        let crews = [crew];
        slots.post(&crews, Instant::now());
        (0..2).for_each(|slot| drop(slots.order(slot)));
        slots.answered(1);
        slots.brought(1, 7);
        slots.lose();
        // Of the claim that is outstanding an answer is awaited, and what was brought may have to go back.
        assert!(slots.is_outstanding_at(0));
        slots.answered(0);
        assert!(matches!(slots.order(1), Some(Order::Take(..))));
        assert_eq!(slots.took(1), Some(7));
        for slot in 0..2 {
            assert_eq!(slots.order(slot), None);
        }
        assert_eq!(slots.post(&crews, Instant::now()), [0, 1]);
        assert_eq!(slots.order(0), Some(Order::Connect));
        assert_eq!(connect(&mut slots, 0), (3, vec![]));
    }

    #[test]
    fn a_lease_that_is_lost_while_a_slot_has_no_connection_leaves_no_trace_in_it() {
        let crew = crew(&["a"], 6);
        let mut slots = connected(&crew);
        let crews = [crew];
        slots.post(&crews, Instant::now());
        slots.order(0);
        slots.answered(0);
        slots.brought(0, 7);
        slots.failed(0, None);
        slots.lose();
        assert!(!slots.have_brought());
        assert_eq!(slots.post(&crews, Instant::now()), [0]);
        assert_eq!(connect(&mut slots, 0), (3, vec![]));
        slots.post(&crews, Instant::now());
        assert!(matches!(slots.order(0), Some(Order::Claim(..))));
        slots.answered(0);
        slots.brought(0, 8);
        assert!(matches!(slots.order(0), Some(Order::Take(..))));
    }
}
