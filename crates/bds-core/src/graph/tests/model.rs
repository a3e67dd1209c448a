//! Random changes against a plain model: the same edges, the same counts, the same refusals.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{ProptestConfig, Strategy, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;

use super::fakes::{Fixture, run};
use crate::graph::{CloseError, NodeRef, walk};
use crate::{Options, Result};

/// Names in play; few, so that they are fought over.
const NAMES: usize = 8;

#[derive(Clone, Debug)]
enum Command {
    OpenFile(usize),
    OpenFilter(usize, usize),
    OpenImage(usize, usize),
    Clone(usize),
    Drop(usize),
    Close(usize),
    SetBacking(usize, Option<usize>),
    Append(usize, usize),
    Replace(usize, usize),
}

fn command() -> impl Strategy<Value = Command> {
    let n = 0..64usize;
    let some = || proptest::option::of(0..64usize);
    prop_oneof![
        2 => n.clone().prop_map(Command::OpenFile),
        1 => (n.clone(), n.clone()).prop_map(|(a, b)| Command::OpenFilter(a, b)),
        3 => (n.clone(), n.clone()).prop_map(|(a, b)| Command::OpenImage(a, b)),
        1 => n.clone().prop_map(Command::Clone),
        2 => n.clone().prop_map(Command::Drop),
        1 => n.clone().prop_map(Command::Close),
        2 => (n.clone(), some()).prop_map(|(a, b)| Command::SetBacking(a, b)),
        2 => (n.clone(), n.clone()).prop_map(|(a, b)| Command::Append(a, b)),
        2 => (n.clone(), n).prop_map(|(a, b)| Command::Replace(a, b)),
    ]
}

#[derive(Clone, Default)]
struct Model {
    nodes: BTreeMap<String, ModelNode>,
}

#[derive(Clone, Default)]
struct ModelNode {
    is_image: bool,
    children: BTreeMap<&'static str, String>,
    users: usize,
}

impl Model {
    fn below(&self, name: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![name.to_owned()];
        while let Some(name) = todo.pop() {
            if seen.insert(name.clone()) {
                todo.extend(self.nodes[&name].children.values().cloned());
            }
        }
        seen
    }

    fn parents(&self, name: &str) -> usize {
        self.nodes.values().flat_map(|node| node.children.values()).filter(|c| *c == name).count()
    }

    fn bury(&mut self) {
        loop {
            let dead = |name: &&String| self.nodes[*name].users == 0 && self.parents(name) == 0;
            let Some(name) = self.nodes.keys().find(dead).cloned() else { return };
            self.nodes.remove(&name);
        }
    }

    fn open(&mut self, name: &str, is_image: bool, children: &[(&'static str, &str)]) -> bool {
        if self.nodes.contains_key(name) {
            return false;
        }
        let children = children.iter().map(|(child, to)| (*child, (*to).to_owned())).collect();
        self.nodes.insert(name.to_owned(), ModelNode { is_image, children, users: 1 });
        true
    }

    fn set_backing(&mut self, node: &str, backing: Option<&str>) -> bool {
        let Some(backing) = backing else {
            self.nodes.get_mut(node).unwrap().children.remove("backing");
            return true;
        };
        if !self.nodes[node].is_image || self.below(backing).contains(node) {
            return false;
        }
        let backing = backing.to_owned();
        self.nodes.get_mut(node).unwrap().children.insert("backing", backing);
        true
    }

    fn append(&mut self, top: &str, overlay: &str) -> bool {
        let found = self.nodes[overlay].children.get("backing").cloned();
        let fits = match found {
            Some(backing) => backing == top,
            None => self.set_backing(overlay, Some(top)),
        };
        fits && self.move_parents(top, overlay)
    }

    fn move_parents(&mut self, from: &str, to: &str) -> bool {
        let stay = self.below(to);
        for (name, node) in &mut self.nodes {
            if stay.contains(name) || from == to {
                continue;
            }
            for target in node.children.values_mut().filter(|target| *target == from) {
                to.clone_into(target);
            }
        }
        true
    }

    /// Edges and counts.
    fn picture(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, node) in &self.nodes {
            lines.push(format!("{name} {}", node.users + self.parents(name)));
            lines.extend(node.children.iter().map(|(child, to)| format!("{name}.{child} {to}")));
        }
        lines
    }
}

fn picture(world: &Fixture) -> Vec<String> {
    let mut lines = Vec::new();
    for node in world.graph.nodes() {
        lines.push(format!("{} {}", node.name(), node.count() - 1));
        let mut children: Vec<String> = walk::children(&node)
            .iter()
            .map(|(child, _, target)| format!("{}.{child} {}", node.name(), target.name()))
            .collect();
        children.sort();
        lines.extend(children);
    }
    lines
}

struct Run {
    world: Fixture,
    model: Model,
    refs: Vec<NodeRef>,
}

impl Run {
    fn pick(&self, index: usize) -> Option<(usize, String)> {
        let index = index % self.refs.len().max(1);
        self.refs.get(index).map(|node| (index, node.name().to_owned()))
    }

    async fn open(&mut self, name: usize, text: &str) -> Result<()> {
        let text = format!("node-name=n{},{text}", name % NAMES);
        let node = self.world.graph.open(Options::parse(&text).unwrap()).await?;
        self.refs.push(node);
        Ok(())
    }

    /// Does it to both. `None` if there is nothing to do it to.
    async fn step(&mut self, command: Command) -> Option<(bool, bool)> {
        let name = |n: usize| format!("n{}", n % NAMES);
        Some(match command {
            Command::OpenFile(n) => {
                let wanted = self.model.open(&name(n), false, &[]);
                (wanted, self.open(n, "driver=file,filename=a").await.is_ok())
            }
            Command::OpenFilter(n, on) => {
                let (_, on) = self.pick(on)?;
                let wanted = self.model.open(&name(n), false, &[("file", &on)]);
                (wanted, self.open(n, &format!("driver=pass,read-only=on,file={on}")).await.is_ok())
            }
            Command::OpenImage(n, on) => {
                let (_, on) = self.pick(on)?;
                let wanted = self.model.open(&name(n), true, &[("file", &on)]);
                (wanted, self.open(n, &format!("driver=cow,read-only=on,file={on}")).await.is_ok())
            }
            Command::Clone(i) => {
                let (i, name) = self.pick(i)?;
                self.model.nodes.get_mut(&name).unwrap().users += 1;
                self.refs.push(self.refs[i].clone());
                (true, true)
            }
            Command::Drop(i) => {
                let (i, name) = self.pick(i)?;
                self.model.nodes.get_mut(&name).unwrap().users -= 1;
                drop(self.refs.swap_remove(i));
                (true, true)
            }
            Command::Close(i) => {
                let (i, name) = self.pick(i)?;
                let wanted = self.model.nodes[&name].users + self.model.parents(&name) == 1;
                if wanted {
                    self.model.nodes.get_mut(&name).unwrap().users = 0;
                }
                match self.refs.swap_remove(i).close().await {
                    Ok(report) => (wanted, report.is_clean()),
                    Err(CloseError::InUse { node, .. }) => {
                        self.refs.push(node);
                        (wanted, false)
                    }
                }
            }
            Command::SetBacking(node, backing) => {
                let (node, node_name) = self.pick(node)?;
                let backing = backing.and_then(|b| self.pick(b));
                let wanted =
                    self.model.set_backing(&node_name, backing.as_ref().map(|(_, name)| &**name));
                let backing = backing.map(|(index, _)| &self.refs[index]);
                (wanted, self.world.graph.set_backing(&self.refs[node], backing).await.is_ok())
            }
            Command::Append(top, overlay) => {
                let (top, top_name) = self.pick(top)?;
                let (overlay, overlay_name) = self.pick(overlay)?;
                let wanted = self.model.append(&top_name, &overlay_name);
                let change = self.world.graph.append(&self.refs[top], &self.refs[overlay]);
                (wanted, change.await.is_ok())
            }
            Command::Replace(from, to) => {
                let (from, from_name) = self.pick(from)?;
                let (to, to_name) = self.pick(to)?;
                let wanted = self.model.move_parents(&from_name, &to_name);
                let change = self.world.graph.replace(&self.refs[from], &self.refs[to]);
                (wanted, change.await.is_ok())
            }
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    #[test]
    fn random_changes_agree_with_the_model(
        commands in proptest::collection::vec(command(), 1..60),
    ) {
        let outcome = std::cell::RefCell::new(Ok(()));
        run(|world| async {
            world.plain("a");
            let mut run = Run { world, model: Model::default(), refs: Vec::new() };
            for command in commands {
                let what = format!("{command:?}");
                let Some((wanted, found)) = run.step(command).await else { continue };
                run.model.bury();
                run.world.graph.reap().await;
                let check = || {
                    prop_assert_eq!(found, wanted, "{}", &what);
                    prop_assert_eq!(picture(&run.world), run.model.picture(), "after {}", &what);
                    Ok::<(), TestCaseError>(())
                };
                if let Err(error) = check() {
                    *outcome.borrow_mut() = Err(error);
                    return;
                }
            }
            run.refs.clear();
            run.world.graph.reap().await;
            let left = run.world.graph.dump();
            if !left.is_empty() {
                *outcome.borrow_mut() = Err(TestCaseError::fail(format!("left open: {left}")));
            }
        });
        outcome.into_inner()?;
    }
}
