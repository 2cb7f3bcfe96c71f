// Runs cases of one real cache client, in one mode, against the server that the actions' own variables name.
//
//     node cache.mjs cache-<version>-v1|v2 <case>[,<case>…]     (`all` runs every case)
//
// Reports as client.mjs does. WHARFINGER_TEST_CACHE_TOKENS holds, as JSON, the tokens of other jobs by what they are:
// see `scopes` and `denied`.
import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { MiB, assertSameFiles, makeFiles, runCases } from './common.mjs'

const [clientName, chosen] = process.argv.slice(2)
const [, major, minor, mode] = clientName?.match(/^cache-(\d+)\.(\d+)\.\d+-(v[12])$/) ?? []
assert(mode && chosen, 'usage: cache.mjs cache-<version>-v1|v2 <case>[,<case>…]|all')

/** Is this client at least wanted.minor? */
const since = (wanted, at) => Number(major) > wanted || (Number(major) === wanted && Number(minor) >= at)

// Any text means v2, even `false`; nothing means v1.
process.env.ACTIONS_CACHE_SERVICE_V2 = mode === 'v2' ? 'True' : ''
const cache = await import(clientName.slice(0, -3))

// ---- what the client says

// A cache client swallows every error: it says `::warning::` and goes on as if nothing had been saved.
let said = ''
const write = process.stdout.write
process.stdout.write = function (chunk, ...rest) {
  said += chunk
  return write.call(this, chunk, ...rest)
}

/** What was said since the last call. */
function heard() {
  const text = said
  said = ''
  return text
}

// 4.0 in v2 mode warns of every miss and of every key that is taken.
const ordinary =
  mode === 'v2' && !since(4, 1) ? /^::warning::(Cache not found for keys: |Failed to save: .*\(409\) Conflict: )/ : /$^/

function assertNoComplaint(text = heard()) {
  const complaints = text.match(/^::(warning|error)::.*$/gm) ?? []
  const [complaint] = complaints.filter(line => !ordinary.test(line))
  assert(!complaint, complaint)
}

// ---- what all cases do

async function save(root, key) {
  const id = await cache.saveCache([root], key)
  assertNoComplaint()
  assert(Number.isSafeInteger(id) && id > 0, `save of ${key}: id ${id}`)
}

/** Whoever comes second gets no entry, and nothing to worry about. */
async function assertTaken(root, key) {
  assert.equal(await cache.saveCache([root], key), -1)
  const text = heard()
  assert.match(text, /Unable to reserve cache with key|\(409\) Conflict: .*already exists/)
  assertNoComplaint(text)
}

async function restore(root, key, ...restoreKeys) {
  fs.rmSync(root, { recursive: true, force: true })
  const matched = await cache.restoreCache([root], key, restoreKeys)
  assertNoComplaint()
  return matched
}

async function assertMiss(root, key, ...restoreKeys) {
  assert.equal(await restore(root, key, ...restoreKeys), undefined)
  assert(!fs.existsSync(root))
}

/** A cache's version depends on its paths: what can replace each other lies in the same directory. */
async function fill(root, contents) {
  fs.rmSync(root, { recursive: true, force: true })
  const { hashes } = await makeFiles(root, contents)
  return hashes
}

async function assertHit(root, matched, hashes, key, ...restoreKeys) {
  assert.equal(await restore(root, key, ...restoreKeys), matched)
  assertSameFiles(root, hashes)
}

async function as(token, act) {
  const own = process.env.ACTIONS_RUNTIME_TOKEN
  const tokens = JSON.parse(process.env.WHARFINGER_TEST_CACHE_TOKENS ?? '{}')
  assert(tokens[token], `WHARFINGER_TEST_CACHE_TOKENS has no ${token}`)
  // The client reads the token at every call.
  process.env.ACTIONS_RUNTIME_TOKEN = tokens[token]
  try {
    return await act()
  } finally {
    process.env.ACTIONS_RUNTIME_TOKEN = own
  }
}

// ---- cases: (directory of its own, key of its own) => detail

const cases = {
  async exact(root, key) {
    const hashes = await fill(root, { 'a.txt': 'Ahoy! 港\n', 'deep/er/b.bin': 300_000, 'empty': '' })
    await save(root, key)
    assert.equal(await cache.restoreCache([root], key, [], { lookupOnly: true }), key)
    await assertHit(root, key, hashes, key)
  },

  async prefix(root, key) {
    const saved = async (name, content) => {
      const hashes = await fill(root, { 'which.txt': content })
      await save(root, `${key}${name}`)
      return hashes
    }
    await saved('-linux-1', 'old')
    const underscore = await saved('_a', 'underscore')
    const newest = await saved('-linux-2', 'new')
    await saved('xa', 'any character')
    await assertHit(root, `${key}-linux-2`, newest, `${key}-linux-3`, 'other-', `${key}-linux-`)
    // `_` and `%` are characters like any other.
    await assertHit(root, `${key}_a`, underscore, `${key}-linux-3`, `${key}_`)
    await assertMiss(root, `${key}-linux-3`, `${key}%`, `%${key}`)
    return 'the newest of two; _ and % match themselves only'
  },

  async miss(root, key) {
    await assertMiss(root, key, 'other-', 'x-')
    await fill(root, { 'a.txt': 'a' })
    await save(root, key)
    // The same key with other paths is another version.
    await assertMiss(`${root}/elsewhere`, key)
    return 'an unknown key, and a known one of another version'
  },

  async conflict(root, key) {
    const first = await fill(root, { 'a.txt': 'first' })
    await save(root, key)
    await fill(root, { 'a.txt': 'second' })
    await assertTaken(root, key)
    await assertHit(root, key, first, key)
    return 'the first stays'
  },

  async '200mb'(root, key) {
    const hashes = await fill(root, { 'large.bin': 200 * MiB })
    const started = Date.now()
    await save(root, key)
    const sent = Date.now()
    await assertHit(root, key, hashes, key)
    return `up ${sent - started} ms, down ${Date.now() - sent} ms`
  },

  async eight(root, key) {
    const all = await Promise.all(
      Array.from({ length: 8 }, async (_, i) => {
        const one = { root: `${root}/${i}`, key: `${key} ${i}` }
        return { ...one, hashes: await fill(one.root, { 'a.bin': i * 1_500_000, 'which.txt': `${i}` }) }
      })
    )
    await Promise.all(all.map(one => save(one.root, one.key)))
    await Promise.all(all.map(one => assertHit(one.root, one.key, one.hashes, one.key)))
    // Eight for one key: one gets it, and what it says is what it sent.
    const ids = await Promise.all(all.map(() => cache.saveCache([all[1].root], key)))
    assert.equal(ids.filter(id => id > 0).length, 1, `${ids}`)
    assertNoComplaint()
    await assertHit(all[1].root, key, all[1].hashes, key)
    return 'eight keys; one key eight times is saved once'
  },

  async scopes(root, key) {
    const saved = async (token, name) => {
      const hashes = await fill(root, { 'whose.txt': `${token}'s ${name}` })
      await as(token, () => save(root, `${key}-${name}`))
      return hashes
    }
    const hit = (token, name, hashes) => as(token, () => assertHit(root, `${key}-${name}`, hashes, `${key}-${name}`))
    const missed = (token, name) => as(token, () => assertMiss(root, `${key}-${name}`, `${key}-${name}`))

    const shared = await saved('main', 'shared')
    for (const token of ['main', 'feature', 'sibling', 'pull', 'otherPull']) await hit(token, 'shared', shared)
    for (const token of ['otherRepository', 'otherIssuer']) await missed(token, 'shared')
    // The same key in one's own scope is another entry, and comes first.
    const own = await saved('feature', 'shared')
    await hit('feature', 'shared', own)
    for (const token of ['main', 'sibling', 'pull']) await hit(token, 'shared', shared)
    for (const [token, others] of [
      ['feature', ['main', 'sibling', 'pull', 'otherPull', 'otherRepository', 'otherIssuer']],
      ['pull', ['main', 'feature', 'sibling', 'otherPull', 'otherRepository', 'otherIssuer']]
    ]) {
      const hashes = await saved(token, token)
      await hit(token, token, hashes)
      for (const other of others) await missed(other, token)
    }
    return 'two branches, two pull requests, another repository and another issuer'
  },

  async denied(root, key) {
    const hashes = await fill(root, { 'a.txt': key })
    await as('otherIssuer', () => save(root, key))
    await as('readOnly', () => assertHit(root, key, hashes, key))
    assert.equal(await as('readOnly', () => cache.saveCache([root], `${key} 2`)), -1)
    // Before 5.0 a v2 client does not pass the reason on, before 6.2 a v1 client none for reading.
    assert.match(heard(), mode === 'v1' || since(5, 0) ? /cache write denied:/ : /Unable to reserve/)
    await as('otherIssuer', () => assertMiss(root, `${key} 2`))
    assert.equal(await as('writeOnly', () => cache.restoreCache([root], key)), undefined)
    assert.match(heard(), mode === 'v2' || since(6, 2) ? /cache read denied:/ : /responded with 403/)
    return 'no writing with a token to read, no reading with one to write'
  }
}

const names = chosen === 'all' ? Object.keys(cases) : chosen.split(',')
for (const name of names) assert(cases[name], `no case ${name}`)
await runCases(clientName, names, name => cases[name])
// A timed-out case may have left something open.
process.exit(0)
