// The decisions of runner/wharfinger.cjs, on paths of every system. Says nothing when all is well.
const assert = require('assert/strict')
const path = require('path')
const { actionOf, changes, isListed, serverUrl } = require('../../runner/wharfinger.cjs')

const runtime = { GITHUB_ACTION: '__run', ACTIONS_RUNTIME_TOKEN: 't', ACTIONS_RESULTS_URL: 'https://results.example/' }
const of = (argv, env = {}, files = [], paths = path.posix) =>
  actionOf({ ...runtime, ...env }, argv, paths, file => files.includes(file))

// ---- which action a process is

for (const [script, action] of [
  ['/home/runner/_work/_actions/actions/upload-artifact/v7/dist/upload/index.js', 'actions/upload-artifact'],
  // In a container.
  ['/__w/_actions/actions/cache/v5/dist/restore/index.js', 'actions/cache'],
  ['/Users/ci/actions-runner/_work/_actions/gradle/actions/v4/setup/dist/index.js', 'gradle/actions'],
  ['C:\\actions-runner\\_work\\_actions\\actions\\setup-node\\v6\\dist\\setup\\index.js', 'actions/setup-node'],
  ['D:\\a\\_actions/actions/cache/v4/dist/save/index.js', 'actions/cache']
]) {
  for (const paths of [path.posix, path.win32]) assert.equal(of(['node', script], {}, [], paths), action)
}
// Where act and its like have them.
assert.equal(of(['node', '/var/run/act/actions/8f14e45f/dist/index.js'], { GITHUB_ACTION_REPOSITORY: 'actions/cache' }), 'actions/cache')

// Actions of the job's own repository.
const posix = { GITHUB_WORKSPACE: '/w/demo/demo' }
const local = (script, files) => of(['node', script], posix, files)
assert.equal(local('/w/demo/demo/.github/actions/x/dist/index.js', ['/w/demo/demo/.github/actions/x/action.yml']), './.github/actions/x')
assert.equal(local('/w/demo/demo/index.js', ['/w/demo/demo/action.yaml']), './')
assert.equal(local('/w/demo/demo/scripts/build.js', []), undefined)
assert.equal(local('/w/demo/demo-2/index.js', ['/w/demo/demo-2/action.yml']), undefined)
assert.equal(local('/w/demo/demo/../index.js', ['/w/demo/action.yml']), undefined)
const windows = { GITHUB_WORKSPACE: 'C:\\w\\demo\\demo' }
const action = 'C:\\w\\demo\\demo\\x\\action.yml'
assert.equal(of(['node', 'C:\\w\\demo\\demo\\x\\dist\\index.js'], windows, [action], path.win32), './x')
assert.equal(of(['node', 'D:\\elsewhere\\index.js'], windows, ['D:\\elsewhere\\action.yml'], path.win32), undefined)

// No action: another command line, or not what the runner gives to actions alone.
const upload = '/w/_actions/actions/upload-artifact/v7/dist/upload/index.js'
assert.equal(of(['node']), undefined)
assert.equal(of(['node', '/usr/lib/node_modules/npm/bin/npm-cli.js', 'ci']), undefined)
assert.equal(of(['node', '/usr/lib/node_modules/npm/bin/npm-cli.js']), undefined)
assert.equal(of(['node', upload, 'an argument']), undefined)
for (const name of Object.keys(runtime)) assert.equal(of(['node', upload], { [name]: '' }), undefined, name)
assert.equal(of(['node', upload], { ACTIONS_RESULTS_URL: '', ACTIONS_RUNTIME_URL: 'https://x/' }), 'actions/upload-artifact')

// ---- which of them may be told that they run on github.com

for (const listed of ['actions/upload-artifact', 'actions/download-artifact', 'actions/cache', 'Actions/Setup-Node']) assert(isListed(listed), listed)
for (const other of ['actions/checkout', 'actions/cache-not', 'octo/cache', 'actions/setup-a/b', 'x/actions/cache', './x']) assert(!isListed(other), other)
for (const [more, also] of [['octo/cache, gradle/*', 'gradle/actions'], ['./.github/actions/x', './.github/actions/x'], ['octo/c.c', 'octo/c.c']]) assert(isListed(also, more))
assert(!isListed('octo/cac', 'octo/c.c'))

// ---- the server's URL

assert.equal(serverUrl('https://artifacts.example.com'), 'https://artifacts.example.com/')
assert.equal(serverUrl('http://127.0.0.1:8080/'), 'http://127.0.0.1:8080/')
for (const bad of ['artifacts.example.com', 'https://a.example/prefix', 'https://a.example/?x', 'https://u:canary@a.example', 'ftp://a.example', '']) {
  assert.throws(() => serverUrl(bad), error => /must be an origin/.test(error.message) && !/canary/.test(error.message), bad)
}

// ---- what changes

const url = 'https://w.example/'
const redirected = { ACTIONS_RESULTS_URL: url, ACTIONS_CACHE_URL: url, ACTIONS_RUNTIME_URL: url, ACTIONS_CACHE_SERVICE_V2: 'True' }
const github = { ...runtime, GITHUB_SERVER_URL: 'https://github.com', PATH: '/bin' }
assert.deepEqual(changes(github, url, true), redirected)
assert.deepEqual(changes(github, url, true, 'minted'), { ...redirected, ACTIONS_RUNTIME_TOKEN: 'minted' })
assert.deepEqual(changes({ ...github, ...redirected }, url, true), {})
for (const [server, refused] of [
  ['https://ghes.example.com', true],
  ['http://127.0.0.1:3000', true],
  ['https://github.com.example.com', true],
  ['https://octo.ghe.com', false],
  ['https://GitHub.com', false],
  ['', false]
]) {
  const change = changes({ ...github, GITHUB_SERVER_URL: server }, url, true)
  assert.equal(change.GITHUB_SERVER_URL, refused ? 'https://github.com' : undefined, server)
  assert(!('GITHUB_SERVER_URL' in changes({ ...github, GITHUB_SERVER_URL: server }, url, false)), server)
}
