//! A crew: the threads of this process that take jobs from the same queues, in orders drawn alike. Sidekiq calls it a
//! capsule.

use crate::parker::{Errand, Parker};
use crate::registry::Handle;
use crate::scripts::Claim;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The queues that a crew takes from, and how the order of them is drawn.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where the order is drawn, a queue of weight `n` stands here `n` times.
    queues: Vec<Arc<[u8]>>,
    /// How many there are.
    count: usize,
    strict: bool,
}

impl Plan {
    /// A plan. `strict`: always in this order; else the order is drawn anew for each job, a queue that is named more than
    /// once being likelier to come first.
    #[must_use]
    pub fn new(queues: impl IntoIterator<Item = Vec<u8>>, strict: bool) -> Self {
        let queues: Vec<Arc<[u8]>> = queues.into_iter().map(Arc::from).collect();
        let one = queues.windows(2).all(|pair| pair[0] == pair[1]);
        let strict = strict || one;
        let count = distinct(queues.clone()).len();
        Self {
            queues: if strict { distinct(queues) } else { queues },
            count,
            strict,
        }
    }

    /// How many queues there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The names of the queues.
    pub fn queues(&self) -> impl Iterator<Item = &Arc<[u8]>> {
        self.queues.iter()
    }

    /// The names of the queues, each once: first the likeliest, so many, in a strict order those that come first; then the others,
    /// in an order that is drawn.
    #[must_use]
    pub fn likeliest(&self, first: usize, dice: &mut fastrand::Rng) -> Vec<Arc<[u8]>> {
        let weight = |queue: &Arc<[u8]>| self.queues.iter().filter(|other| *other == queue).count();
        let mut queues = distinct(self.queues.clone());
        if !self.strict {
            dice.shuffle(&mut queues);
        }
        queues.sort_by_key(|queue| std::cmp::Reverse(weight(queue)));
        if let Some(others) = queues.get_mut(first..) {
            dice.shuffle(others);
        }
        queues
    }

    /// What so many threads want: one order for each job, as Sidekiq's own fetch draws it.
    #[must_use]
    pub fn claims(&self, threads: usize, dice: &mut fastrand::Rng) -> Vec<Claim> {
        if threads == 0 || self.queues.is_empty() {
            return Vec::new();
        }
        if self.strict {
            return vec![Claim {
                threads,
                orders: vec![self.queues.clone()],
            }];
        }
        let mut claims: Vec<Claim> = Vec::new();
        for _ in 0..threads {
            let mut queues = self.queues.clone();
            dice.shuffle(&mut queues);
            let order = distinct(queues);
            match claims.iter_mut().find(|claim| claim.orders[0][0] == order[0]) {
                Some(claim) => {
                    claim.threads += 1;
                    claim.orders.push(order);
                }
                None => claims.push(Claim {
                    threads: 1,
                    orders: vec![order],
                }),
            }
        }
        claims
    }
}

fn distinct(mut queues: Vec<Arc<[u8]>>) -> Vec<Arc<[u8]>> {
    let mut seen = HashSet::with_capacity(queues.len());
    queues.retain(|queue| seen.insert(queue.clone()));
    queues
}

/// How long a job may lie ready without a thread that waits for it. Threads look away between two waits, for moments only.
const GRACE: Duration = Duration::from_millis(20);

/// The threads that wait, and the jobs that are claimed for them.
///
/// A job is no single thread's: whichever comes first takes it. So a thread that ends a job takes the next one without
/// ever sleeping, and only as many threads wake up as find something to do.
#[derive(Debug)]
pub struct Crew {
    /// Where its jobs come from.
    pub plan: Plan,
    /// The threads that wait, the one that has waited longest first. One that is done has been woken, and has not yet come.
    waiting: VecDeque<Arc<Parker>>,
    /// Jobs that are claimed and not yet taken, the oldest first.
    ready: VecDeque<Handle>,
    /// How many jobs the outstanding turn asks for.
    pub claimed: usize,
    /// How many claims of it wait in Redis.
    pub blocked: usize,
    /// The last claim found less than it asked for: the queues are empty, until Redis says otherwise.
    pub dry: bool,
    /// No job is claimed for it any more.
    quiet: bool,
    /// Its threads do not wait any more.
    pub dismissed: bool,
    /// Since when there are more ready jobs than threads that wait.
    surplus: Option<Instant>,
}

impl Crew {
    /// A crew of which nobody waits yet.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
            claimed: 0,
            blocked: 0,
            dry: false,
            quiet: false,
            dismissed: false,
            surplus: None,
        }
    }

    /// For how many threads there is no job yet, neither ready nor asked for.
    #[must_use]
    pub fn wanted(&self) -> usize {
        if self.quiet || self.plan.queues.is_empty() {
            return 0;
        }
        self.waiting.len().saturating_sub(self.ready.len() + self.claimed)
    }

    /// The same, without those for whom a claim waits in Redis: so many a turn may ask for.
    #[must_use]
    pub fn wanted_now(&self) -> usize {
        self.wanted().saturating_sub(self.blocked)
    }

    /// How many of the claims that wait in Redis are too many: there are fewer threads for them, or the queues have something
    /// and no thread is left that a turn might ask for.
    #[must_use]
    pub fn surplus_claims(&self) -> usize {
        let wanted = self.wanted();
        if !self.dry && wanted > 0 && self.wanted_now() == 0 {
            return self.blocked;
        }
        self.blocked.saturating_sub(wanted)
    }

    /// Whether a claim should go now. A claim that waited for more threads would cost Redis less for each job, but the
    /// native threads and Redis would go to sleep meanwhile, and to wake them takes longer, on all sides, than the call: jobs
    /// run out before the next ones come.
    #[must_use]
    pub fn is_hungry(&self) -> bool {
        !self.dry && self.wanted_now() > 0
    }

    /// Whether threads wait for something to come into queues that were found empty.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.dry && self.wanted() > 0
    }

    /// A thread waits.
    pub fn wait(&mut self, parker: Arc<Parker>) {
        self.waiting.push_back(parker);
    }

    /// A thread waits no more, for whatever reason. Another is woken in its place, if there is something to take.
    pub fn stop_waiting(&mut self, parker: &Arc<Parker>, now: Instant) {
        self.waiting.retain(|other| !Arc::ptr_eq(other, parker));
        self.wake();
        self.weigh(now);
    }

    /// A thread has been woken, and waits no more. It takes what there is to take, which wakes the next.
    pub fn arrive(&mut self, parker: &Arc<Parker>) {
        self.waiting.retain(|other| !Arc::ptr_eq(other, parker));
    }

    /// A job is claimed.
    pub fn add(&mut self, job: Handle) {
        self.ready.push_back(job);
    }

    /// Takes a job.
    pub fn take(&mut self, now: Instant) -> Option<Handle> {
        let job = self.ready.pop_front()?;
        self.wake();
        self.weigh(now);
        Some(job)
    }

    /// Whether there is something to take.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Wakes one thread, unless one is on its way: that one wakes the next, if there is more to take by then.
    pub fn wake(&self) {
        if let Some(parker) = self.call() {
            parker.ring();
        }
    }

    /// The same, but for the last step: the thread that is on its way now is still to be rung.
    #[must_use]
    pub fn call(&self) -> Option<Arc<Parker>> {
        if self.ready.is_empty() {
            return None;
        }
        let mut sleeping = None;
        // The one that has just gone to sleep wakes up quickest.
        for parker in self.waiting.iter().rev() {
            if parker.is_done() {
                return None;
            }
            sleeping = sleeping.or(Some(parker));
        }
        let parker = sleeping?;
        parker.settle();
        Some(parker.clone())
    }

    /// The same for a thread that is awake: it is the one that comes, if it still waits for a job. Answers whether it does.
    pub(crate) fn tell(&self, awake: &Parker) -> bool {
        let waits = self.waiting.iter().any(|parker| std::ptr::eq(&**parker, awake)) && !awake.is_done();
        if waits {
            awake.settle();
        }
        waits
    }

    /// Has one of the threads that wait do this meanwhile. Answers it where none has the time.
    pub(crate) fn lend(&self, errand: Box<dyn Errand>) -> Option<Box<dyn Errand>> {
        let mut errand = errand;
        for parker in self.waiting.iter().rev() {
            errand = parker.lend(errand)?;
        }
        Some(errand)
    }

    /// Notes since when there is too much.
    pub fn weigh(&mut self, now: Instant) {
        if self.ready.len() <= self.waiting.len() {
            self.surplus = None;
        } else {
            self.surplus.get_or_insert(now);
        }
    }

    /// When the ready jobs that no thread waits for are to go back.
    #[must_use]
    pub fn gives_back_at(&self) -> Option<Instant> {
        self.surplus.map(|since| since + GRACE)
    }

    /// The ready jobs that no thread has waited for in time.
    pub fn give_back(&mut self, now: Instant) -> Vec<Handle> {
        if self.gives_back_at().is_none_or(|at| now < at) {
            return Vec::new();
        }
        let surplus = self.ready.split_off(self.waiting.len().min(self.ready.len()));
        self.surplus = None;
        surplus.into()
    }

    /// No job is claimed for it any more. Answers all ready jobs.
    pub fn be_quiet(&mut self) -> Vec<Handle> {
        self.quiet = true;
        self.clear()
    }

    /// Whether jobs are claimed for it.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// All ready jobs.
    pub fn clear(&mut self) -> Vec<Handle> {
        self.surplus = None;
        self.ready.drain(..).collect()
    }

    /// The threads that wait, to be sent away.
    pub fn dismiss(&mut self) -> Vec<Arc<Parker>> {
        self.dismissed = true;
        self.waiting.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(queues: &[&str], strict: bool) -> Plan {
        Plan::new(queues.iter().map(|queue| queue.as_bytes().to_vec()), strict)
    }

    fn names(order: &[Arc<[u8]>]) -> Vec<&str> {
        order.iter().map(|queue| std::str::from_utf8(queue).unwrap()).collect()
    }

    #[test]
    fn a_strict_plan_has_one_order_for_all() {
        let claims = plan(&["a", "b", "a"], true).claims(3, &mut fastrand::Rng::with_seed(1));
        assert_eq!(claims.len(), 1);
        assert_eq!(claims[0].threads, 3);
        assert_eq!(claims[0].orders.len(), 1);
        assert_eq!(names(&claims[0].orders[0]), ["a", "b"]);
    }

    #[test]
    fn one_queue_needs_no_draw() {
        let claims = plan(&["a", "a"], false).claims(2, &mut fastrand::Rng::with_seed(1));
        assert_eq!((claims.len(), claims[0].threads), (1, 2));
    }

    #[test]
    fn the_first_are_the_likeliest_and_the_others_are_drawn() {
        let mut dice = fastrand::Rng::with_seed(5);
        let strict = plan(&["a", "b", "c", "d", "e"], true);
        let weighted = plan(&["a", "b", "b", "b", "c", "c", "d", "e"], false);
        for (plan, first) in [(strict, ["a", "b"]), (weighted, ["b", "c"])] {
            let orders: Vec<_> = (0..200).map(|_| plan.likeliest(2, &mut dice)).collect();
            assert!(orders
                .iter()
                .all(|order| order.len() == 5 && names(order)[..2] == first));
            let third: HashSet<_> = orders.iter().map(|order| order[2].clone()).collect();
            assert_eq!(third.len(), 3);
        }
        assert_eq!(names(&plan(&["a"], true).likeliest(2, &mut dice)), ["a"]);
    }

    #[test]
    fn weights_decide_who_comes_first() {
        let plan = plan(&["a", "a", "a", "b"], false);
        let claims = plan.claims(20_000, &mut fastrand::Rng::with_seed(7));
        assert_eq!(claims.len(), 2);
        assert!(claims.iter().all(|claim| claim.threads == claim.orders.len()));
        let orders: Vec<_> = claims.iter().flat_map(|claim| &claim.orders).collect();
        assert_eq!(orders.len(), 20_000);
        assert!(orders.iter().all(|order| order.len() == 2));
        let first = orders.iter().filter(|order| names(order)[0] == "a").count();
        assert!((14_600..15_400).contains(&first), "{first}");
    }

    #[test]
    fn wakes_one_thread_and_that_one_the_next() {
        let now = Instant::now();
        let mut crew = Crew::new(plan(&["a"], true));
        let threads = [Parker::new(), Parker::new(), Parker::new()];
        threads.iter().for_each(|parker| crew.wait(parker.clone()));
        assert_eq!(crew.wanted(), 3);
        (1..=2).for_each(|job| crew.add(job));
        crew.wake();
        crew.wake();
        let woken = || threads.iter().filter(|parker| parker.is_done()).count();
        assert_eq!(woken(), 1);
        crew.stop_waiting(&threads[2], now);
        assert_eq!(woken(), 2);
        assert_eq!(crew.take(now), Some(1));
        assert_eq!(woken(), 2);
        assert_eq!(crew.wanted(), 1);
    }

    #[test]
    fn a_woken_thread_wakes_the_next_when_it_has_taken_a_job() {
        let now = Instant::now();
        let mut crew = Crew::new(plan(&["a"], true));
        let threads = [Parker::new(), Parker::new()];
        threads.iter().for_each(|parker| crew.wait(parker.clone()));
        crew.add(1);
        crew.wake();
        crew.arrive(&threads[1]);
        assert!(!threads[0].is_done());
        crew.add(2);
        assert_eq!(crew.take(now), Some(1));
        assert!(threads[0].is_done());
    }

    #[test]
    fn gives_back_what_nobody_waits_for() {
        let now = Instant::now();
        let mut crew = Crew::new(plan(&["a"], true));
        let threads = [Parker::new(), Parker::new()];
        threads.iter().for_each(|parker| crew.wait(parker.clone()));
        (1..=2).for_each(|job| crew.add(job));
        crew.stop_waiting(&threads[0], now);
        assert!(crew.give_back(now).is_empty());
        assert_eq!(crew.give_back(now + GRACE), [2]);
        assert_eq!(crew.gives_back_at(), None);
        assert_eq!(crew.clear(), [1]);
    }
}
